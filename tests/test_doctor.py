import resource
import shutil
from importlib import metadata, util
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_fipo import doctor, fused_kernels
from megatron_fipo.ops import extension
from tests.support import installations

PACKAGES = {"megatron-core", "transformers", "Transformer Engine", "nemo-aligner", "math-verify"}
OPS = {"compiled ops", "CUDA kernels"}
OTHERS = (
    {"Python", "PyTorch", "GPU", "NCCL", "NVIDIA apex", "nvcc", "g++", "Slurm", "cores", "memory", "disk"}
    | OPS
    | {"vLLM", "scontrol", "shared memory", "open files", "locked memory", "torch.compile for GPUs"}
)


def found(name):
    return next(finding for finding in doctor.findings() if finding.component.name == name)


def test_names_every_component(capsys):
    """The table has a line for each component, and for each missing one what its absence costs."""
    doctor.diagnose()
    printed = capsys.readouterr().out
    assert {component.name for component in doctor.COMPONENTS} == PACKAGES | OTHERS
    assert all(f"\n {name} " in printed for name in PACKAGES | OTHERS)
    for finding in doctor.findings():
        assert finding.present or finding.component.cost.split()[0] in printed


def test_reports_what_is_installed():
    """Versions are those of the installed distributions."""
    assert found("megatron-core")[1:] == (metadata.version("megatron-core"), True)
    assert found("PyTorch").found.startswith(torch.__version__)


@pytest.mark.parametrize("version", ["0.16.0", "0.20.0"])
def test_a_megatron_that_is_not_supported(monkeypatch, version):
    """A release before the oldest or after the newest counts as missing, and the ones that will do are named."""
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=2.11", "megatron-core<0.20,>=0.16.1"])
    monkeypatch.setattr(metadata, "version", lambda name: version)
    assert found("megatron-core")[1:] == (f"{version}, which is not <0.20,>=0.16.1", False)
    monkeypatch.setattr(metadata, "version", lambda name: "0.19.2")
    assert found("megatron-core")[1:] == ("0.19.2", True)


def test_what_compiling_for_gpus_lacks(monkeypatch):
    """The first thing that is missing, or what is there."""
    monkeypatch.setattr(fused_kernels, "gpu_compiler_problem", lambda: "there is no C compiler: install gcc, or set CC")
    assert found("torch.compile for GPUs")[1:] == ("there is no C compiler: install gcc, or set CC", False)
    monkeypatch.setattr(fused_kernels, "gpu_compiler_problem", lambda: None)
    assert found("torch.compile for GPUs")[1:] == ("Triton, a C compiler and Python's headers", True)


@pytest.mark.parametrize("error", [RuntimeError("[no] CUDA"), KeyError("Version"), OSError(5, "input/output error")])
def test_broken_metadata_does_not_end_it(monkeypatch, capsys, error):
    """Whatever a package's metadata lookup raises, the table is printed and names the error."""

    def broken(_name):
        raise error

    monkeypatch.setattr(metadata, "version", broken)
    monkeypatch.setattr(util, "find_spec", broken)
    doctor.diagnose()
    assert "Transformer Engine" in capsys.readouterr().out
    for name in PACKAGES:
        assert found(name)[1:] == (f"broken: {type(error).__name__}: {error}", False)


def test_torch_that_cannot_be_asked(monkeypatch, capsys):
    """A CUDA runtime that raises is reported, not passed on."""

    def broken():
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    doctor.diagnose()
    assert found("GPU")[1:] == ("broken: RuntimeError: driver too old", False)
    assert "laptop-size" in capsys.readouterr().out


def apex_at(folder, kernels):
    """A find_spec that sees a package `apex` in `folder`."""

    def find_spec(name):
        if name == "amp_C":
            return ModuleSpec("amp_C", None) if kernels else None
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        return spec

    return find_spec


def test_unrelated_apex_is_told_apart(monkeypatch, tmp_path):
    """PyPI's `apex` is not NVIDIA's; NVIDIA's without kernels is not enough; neither is imported."""
    monkeypatch.setattr(util, "find_spec", apex_at(tmp_path, kernels=True))
    assert found("NVIDIA apex")[1:] == ("an unrelated package called apex", False)
    (tmp_path / "optimizers").mkdir()
    assert found("NVIDIA apex")[1:] == ("with its CUDA kernels", True)
    monkeypatch.setattr(util, "find_spec", apex_at(tmp_path, kernels=False))
    assert found("NVIDIA apex")[1:] == ("built without its CUDA kernels (amp_C)", False)


def test_transformer_engine_needs_its_torch_part(monkeypatch, tmp_path):
    """Kernels alone, without the library that pip keeps in wheel_lib/, count as missing; with it, as installed."""
    monkeypatch.syspath_prepend(str(tmp_path / "whole"))
    installations.install_transformer_engine(tmp_path / "whole")
    assert found("Transformer Engine").found.startswith(installations.VERSION)
    assert found("Transformer Engine").present
    monkeypatch.syspath_prepend(str(tmp_path / "core"))
    installations.install_transformer_engine(tmp_path / "core", "FileNotFoundError")
    told = f"{installations.VERSION}, which cannot be imported: FileNotFoundError: Could not find shared object file"
    assert found("Transformer Engine").found.startswith(told)
    assert not found("Transformer Engine").present


def test_programs_are_asked_for_their_version(monkeypatch, tmp_path):
    """A program on PATH shows its version line; one that fails, how it failed; none there, as missing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found("nvcc")[1:] == ("not on PATH", False)
    assert found("Slurm")[1:] == ("sbatch and srun not on PATH", False)
    for name, script in (("nvcc", "echo a; echo tools, release 13.0"), ("sbatch", "echo slurm 24.05"), ("srun", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    assert found("nvcc")[1:] == ("tools, release 13.0", True)
    assert found("Slurm")[1:] == ("slurm 24.05", True)
    (tmp_path / "nvcc").write_text("#!/bin/sh\nexit 3\n")
    assert found("nvcc")[1:] == (f"`{tmp_path}/nvcc --version`: exit code 3", False)
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho sbatch: fatal: no slurm.conf >&2\nexit 1\n")
    assert found("Slurm")[1:] == (f"`{tmp_path}/sbatch --version`: sbatch: fatal: no slurm.conf", False)
    (tmp_path / "sbatch").write_text("#!/bin/sh\nexec /bin/sleep 600\n")
    monkeypatch.setattr(doctor, "_VERSION_SECONDS", 0.2)
    assert found("Slurm")[1:] == (f"`{tmp_path}/sbatch --version` did not answer within 0 s", False)
    (tmp_path / "sbatch").write_text("no program")
    assert found("Slurm")[1:] == (f"`{tmp_path}/sbatch --version` cannot be started: Exec format error", False)


def test_tells_how_the_ops_were_built(monkeypatch):
    """Instruction sets and CUDA architectures, and whether the CUDA kernels are there; or that nothing was built."""
    built = SimpleNamespace(BUILD="g++; CPU: scalar; CUDA: sm_90", HAS_CUDA=True, cpu_isa=lambda: "scalar")
    monkeypatch.setattr(extension, "_extension", built)
    assert found("compiled ops")[1:] == ("g++; CPU: scalar; CUDA: sm_90; in use: scalar", True)
    assert found("CUDA kernels").present
    built.HAS_CUDA = False
    assert found("CUDA kernels")[1:] == ("not built", False)
    monkeypatch.setattr(extension, "_extension", None)
    assert found("compiled ops")[1:] == ("not built", False)
    assert found("CUDA kernels")[1:] == ("not built", False)


def test_limits_that_many_ranks_meet(monkeypatch):
    """Little shared memory, few open files, and locked memory where there is InfiniBand; not where there is room."""
    room = SimpleNamespace(free=2**34)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65536, 65536))
    monkeypatch.setattr(Path, "is_dir", lambda self: str(self) != "/sys/class/infiniband")
    assert found("shared memory")[1:] == ("16 GiB free in /dev/shm", True)
    assert found("open files")[1:] == ("65536 at most", True)
    assert found("locked memory")[1:] == ("0 MiB at most; no InfiniBand here", True)
    room.free = 2**26
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 65536))  # a run raises the first to the second
    assert found("open files")[1:] == ("65536 at most", True)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 1024))
    monkeypatch.setattr(Path, "is_dir", lambda self: True)
    assert found("shared memory")[1:] == ("0.06 GiB free in /dev/shm", False)
    assert found("open files")[1:] == ("1024 at most", False)
    assert found("locked memory")[1:] == ("0 MiB at most", False)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    assert found("open files")[1:] == ("no limit", True)
    assert found("locked memory")[1:] == ("no limit", True)
