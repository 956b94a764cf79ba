"""Report of what this machine has for a run, what is missing, the cost of that, and whether a recipe could start here.

Packages are looked up, not imported: some raise on import without a GPU. Only torch is imported, to query GPUs, and
Transformer Engine, since nothing else shows whether it works.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
from collections import Counter
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import NamedTuple

import psutil
from packaging.requirements import Requirement
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_fipo.config import Config
from megatron_fipo.machine import limits
from megatron_fipo.machine.command import output_of

_SHARED_MEMORY_GIB = 1  # docker's default is 1/16
_NEEDED = ("PyTorch", "megatron-core", "transformers")  # by every run
_VERSION_SECONDS = 20.0
_OPEN_FILES = 4096  # a rank has a connection to every other rank of each process group


class Missing(Exception):
    """A component is missing; the text says what was found instead."""


class Component(NamedTuple):
    """Component of the machine or the installation.

    Attributes:
        probe: returns what was found; raises Missing.
        cost: consequence if it is missing.
    """

    name: str
    probe: Callable[[], str]
    cost: str


class Finding(NamedTuple):
    """Result of probing a component."""

    component: Component
    found: str
    present: bool


def diagnose() -> None:
    """Print a table of every component: what was found, and the cost of what is missing."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("component", no_wrap=True)
    table.add_column("found", ratio=2)
    table.add_column("what its absence costs", ratio=3)
    for component, found, present in findings():
        text = escape(found)
        table.add_row(component.name, *((text, "") if present else (f"[yellow]{text}[/yellow]", component.cost)))
    Console(highlight=False).print(table)


def check_recipe(config: Config, name: str, login_node: bool) -> bool:
    """Print whether `train` could start this configuration here, and if not, what is missing and what to run.

    Args:
        name: the configuration's file.
        login_node: the run will be on other machines, which have GPUs; this one does not need one.
    """
    absent = _missing_packages()
    problems = absent or _run_problems(config, login_node)
    where = "for GPU nodes, in this environment" if login_node else "on this machine"
    print(f"{name}: {'not ready' if problems else 'ready'} {where}")
    for problem in problems:
        print("  - " + problem.replace("\n", "\n    "))
    for note in () if absent else _notes(config, name, login_node):
        print(f"  note: {note}")
    return not problems


def _missing_packages() -> list[str]:
    """Return the missing packages without which nothing else can be checked."""
    absent = [finding for finding in findings() if finding.component.name in _NEEDED and not finding.present]
    return [f"{component.name}: {found}; run `make install`" for component, found, _ in absent]


def _run_problems(config: Config, login_node: bool) -> list[str]:
    from megatron_fipo.checks import run_problems  # imports Megatron-Core and transformers
    from megatron_fipo.launch.rank_task import open_files
    from megatron_fipo.scaling.planner.checkpoint_space import check_space

    problems = run_problems(config, needs_gpu=not login_node)
    if not problems:
        problems.attempt(check_space, config)
    too_few_files = None if login_node else limits.open_files_problem(open_files(config))
    return [*problems, *([too_few_files] if too_few_files else [])]


def _notes(config: Config, name: str, login_node: bool) -> list[str]:
    """Return notes on the run that do not keep it from starting."""
    import torch

    notes = []
    ranks, gpus = config.parallel.world_size, torch.cuda.device_count()
    if login_node:
        notes.append(f"no GPU was tested; `srun --gpus=1 megatron-fipo doctor {name}` tests one on a node")
    elif 0 < gpus < ranks:
        notes.append(
            f"{ranks} ranks need as many GPUs, and this machine has {gpus}: start them with sbatch, see slurm/"
        )
    if (gpus or login_node) and not _probe(_CUDA_KERNELS).present:
        notes.append(f"no CUDA kernels: {_CUDA_KERNELS.cost}")
    return notes


def findings() -> list[Finding]:
    """Probe this machine for all components."""
    return [_probe(component) for component in COMPONENTS]


def _probe(component: Component) -> Finding:
    """Probe one component; an exception of a broken installation becomes part of the finding."""
    try:
        return Finding(component, component.probe(), True)
    except Missing as missing:
        return Finding(component, str(missing), False)
    except Exception as error:
        return Finding(component, f"broken: {type(error).__name__}: {error}", False)


def _package(distribution: str) -> Callable[[], str]:
    return lambda: _version(distribution)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise Missing("not installed") from None


def _megatron() -> str:
    version = _version("megatron-core")
    needed = map(Requirement, metadata.requires("megatron-fipo") or ())
    for allowed in (requirement.specifier for requirement in needed if requirement.name == "megatron-core"):
        if version not in allowed:
            raise Missing(f"{version}, which is not {allowed}")
    return version


def _torch() -> str:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return f"{torch.__version__}, {build}"


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        raise Missing("none" if torch.version.cuda else "none that a CPU build of torch can use")
    names = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return ", ".join(f"{count} x {name}" for name, count in names.items())


def _nccl() -> str:
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_nccl_available()):
        raise Missing("not in this build of torch")
    return ".".join(str(part) for part in torch.cuda.nccl.version())


def _transformer_engine() -> str:
    from megatron_fipo.fused_kernels import find_transformer_engine

    found = find_transformer_engine()
    if found.version is None:
        raise Missing("not installed")
    if found.error is not None:
        raise Missing(f"{found.version}, which cannot be imported: {found.error}")
    return found.version if found.usable else f"{found.version}, not used: {found.gpu_obstacle}"


def _gpu_compiler() -> str:
    from megatron_fipo.fused_kernels import gpu_compiler_problem

    problem = gpu_compiler_problem()
    if problem is not None:
        raise Missing(problem)
    return "Triton, a C compiler and Python's headers"


def _apex() -> str:
    """Find NVIDIA's apex, with its optimizers and CUDA kernels; PyPI's package of this name is a web library."""
    spec = util.find_spec("apex")
    if spec is None:
        raise Missing("not installed")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        raise Missing("an unrelated package called apex")
    if util.find_spec("amp_C") is None:
        raise Missing("built without its CUDA kernels (amp_C)")
    return "with its CUDA kernels"


def _compiled_ops() -> str:
    from megatron_fipo.ops import extension

    if not extension.is_built():
        raise Missing("not built")
    return extension.summary()


def _cuda_kernels() -> str:
    from megatron_fipo.ops import extension

    if not extension.has_cuda():
        raise Missing("not built")
    return "built"


def _vllm() -> str:
    from megatron_fipo import vllm_environment

    try:
        found = vllm_environment.installed(vllm_environment.interpreter(None))
    except ValueError as error:
        raise Missing(str(error).removeprefix("rollout.engine=vllm: ")) from None
    return f"{found.distribution} {found.version} in {found.python.parent.parent}"


def _program(name: str, keyword: str) -> Callable[[], str]:
    """Return a probe for the line of `name --version` that contains `keyword`."""

    def probe() -> str:
        path = shutil.which(name)
        if path is None:
            raise Missing("not on PATH")
        output, error = output_of([path, "--version"], _VERSION_SECONDS)
        if error is not None:
            raise Missing(error)
        return next((line.strip() for line in output.splitlines() if keyword in line), path)

    return probe


def _slurm() -> str:
    absent = [name for name in ("sbatch", "srun") if shutil.which(name) is None]
    if absent:
        raise Missing(f"{' and '.join(absent)} not on PATH")
    return _program("sbatch", "slurm")()


def _scontrol() -> str:
    path = shutil.which("scontrol")
    if path is None:
        raise Missing("not on PATH")
    return path


def _shared_memory() -> str:
    free = shutil.disk_usage("/dev/shm").free / 2**30
    if free < _SHARED_MEMORY_GIB:
        raise Missing(f"{free:.2f} GiB free in /dev/shm")
    return f"{free:.0f} GiB free in /dev/shm"


def _open_files() -> str:
    """Report the limit of open files: a run raises the soft limit, copied from the shell, to the hard one."""
    limit = limits.most_open_files()
    if limit is not None and limit < _OPEN_FILES:
        raise Missing(f"{limit} at most")
    return "no limit" if limit is None else f"{limit} at most"


def _locked_memory() -> str:
    """Report the limit of locked memory: InfiniBand cards access memory that the kernel must not move."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    text = "no limit" if limit == resource.RLIM_INFINITY else f"{limit / 2**20:.0f} MiB at most"
    if not Path("/sys/class/infiniband").is_dir():
        return f"{text}; no InfiniBand here"
    if limit != resource.RLIM_INFINITY:
        raise Missing(text)
    return text


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{usable} usable of {os.cpu_count()}"


def _memory() -> str:
    memory = psutil.virtual_memory()
    return f"{memory.available / 2**30:.0f} GiB free of {memory.total / 2**30:.0f}"


def _disk() -> str:
    disk = shutil.disk_usage(Path.cwd())
    return f"{disk.free / 2**30:.0f} GiB free of {disk.total / 2**30:.0f} in {Path.cwd()}"


_CUDA_KERNELS = Component(
    "CUDA kernels", _cuda_kernels, "the losses of tensors on GPUs run in plain torch; built where nvcc is"
)
COMPONENTS = (
    Component("Python", platform.python_version, ""),
    Component("PyTorch", _torch, "nothing works"),
    Component("GPU", _gpus, "gloo on the CPU: laptop-size models"),
    Component("NCCL", _nccl, "no training on GPUs; CPU ranks use gloo"),
    Component("megatron-core", _megatron, "no training, no evaluation"),
    Component("transformers", _package("transformers"), "no tokenizer, no rollouts"),
    Component(
        "Transformer Engine",
        _transformer_engine,
        "layers of torch: flash attention, but unfused norms and rotary embedding",
    ),
    Component("torch.compile for GPUs", _gpu_compiler, "SwiGLU of torch's layers is not fused and keeps more memory"),
    Component("NVIDIA apex", _apex, "without Transformer Engine too: torch's Adam instead of a fused one"),
    Component("vLLM", _vllm, "no rollout.engine=vllm: rollouts by the embedded hf engine, for small models"),
    Component(
        "nemo-aligner", _package("nemo-aligner"), "the actor has its methods, but is not an instance of its interface"
    ),
    Component("math-verify", _package("math-verify"), "no reward.function=math"),
    Component("compiled ops", _compiled_ops, "the losses run in plain torch, more than ten times slower"),
    _CUDA_KERNELS,
    Component("nvcc", _program("nvcc", "release"), "no Transformer Engine, apex or CUDA kernels from source here"),
    Component("g++", _program("g++", "g++"), "no source builds, no torch.compile on the CPU"),
    Component("Slurm", _slurm, "no batch jobs; train starts its ranks on this machine"),
    Component("scontrol", _scontrol, "the batch script has to requeue a job, see slurm/requeue.sh"),
    Component("shared memory", _shared_memory, "NCCL and gloo fail between ranks of a node; docker: --shm-size"),
    Component("open files", _open_files, "connections of hundreds of ranks fail; raise `ulimit -Hn`"),
    Component("locked memory", _locked_memory, "NCCL fails on InfiniBand; raise `ulimit -l`"),
    Component("cores", _cores, ""),
    Component("memory", _memory, ""),
    Component("disk", _disk, ""),
)
