"""Measure this machine, one rank per GPU or CPU process, to calibrate the planner's constants.

Each measurement gets a fixed share of the time budget, which limits repetitions and sizes.
"""

from __future__ import annotations

import gc
import platform
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_fipo.config import Config, ModelConfig, ParallelConfig
from megatron_fipo.fused_kernels import find_transformer_engine
from megatron_fipo.scaling.calibrate.bench import Bench, Timing
from megatron_fipo.scaling.calibrate.fit import (
    Machine,
    Measurements,
    Product,
    Rate,
    entries,
    fit_gemm,
    noise,
    render,
)
from megatron_fipo.scaling.cost.hardware import hardware_files, name_of
from megatron_fipo.whole_file import write_whole

_SHARES = {
    "products": 0.3,
    "attention": 0.12,
    "memory": 0.08,
    "link": 0.2,
    "layer": 0.1,
}  # of the time budget; the rest is slack
_PROCESSES = 1024  # assumed size of a CPU machine's link group
_DTYPES = ("bfloat16", "float32")
Size = TypeVar("Size")


@dataclass(frozen=True)
class Sizes:
    """Sizes to measure.

    Attributes:
        products: (rows, inner) of matmuls, each run with all `widths`.
        heads, head_dim, lengths: attention shapes.
        elements: size of each array of an elementwise sum.
        messages: bytes per collective.
    """

    products: tuple[tuple[int, int], ...]
    widths: tuple[int, ...]
    heads: int
    head_dim: int
    lengths: tuple[int, ...]
    elements: int
    messages: tuple[int, ...]


ON_GPU = Sizes(
    products=((4096, 4096), (16384, 8192)),
    widths=(128, 256, 512, 1024, 2048, 4096, 8192, 16384),
    heads=32,
    head_dim=128,
    lengths=(2048, 4096, 8192),
    elements=1 << 28,
    messages=(16 << 20, 64 << 20, 256 << 20),
)
ON_CPU = Sizes(
    products=((256, 512), (1024, 1024)),
    widths=(32, 64, 128, 256, 512, 1024, 2048),
    heads=8,
    head_dim=64,
    lengths=(256, 512, 1024),
    elements=1 << 24,
    messages=(1 << 20, 4 << 20, 16 << 20),
)


@dataclass(frozen=True)
class Request:
    """Options of `scaling calibrate`.

    Attributes:
        gpu: name in the calibration file; None: the device's name.
        dtype: of matmuls and attention; None: bfloat16 on a GPU, float32 on a CPU.
        sizes: None: the defaults for the device.
    """

    out: Path
    gpu: str | None
    minutes: float
    dtype: str | None = None
    sizes: Sizes | None = None

    def check(self) -> None:
        """Raise ValueError if an option is invalid."""
        if not 0 < self.minutes < float("inf"):
            raise ValueError(f"--minutes {self.minutes} must be a positive number")
        if self.gpu is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.gpu):
            raise ValueError(f"--gpu {self.gpu!r} must be a name of letters, digits, '.', '_' and '-'")
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise ValueError(f"--dtype {self.dtype!r} must be one of {', '.join(_DTYPES)}")
        if self.out.is_dir() or not self.out.absolute().parent.is_dir():
            raise ValueError(f"--out {self.out} must be a file in an existing directory")
        if not torch.cuda.is_available() and _known_gpu(self.gpu) is not None:
            raise ValueError(
                f"--gpu {self.gpu} is a GPU's name, but this machine has no GPU: choose another name, e.g. cpu"
            )


def calibrate_rank(request: Request) -> None:
    """Calibrate on every rank; rank 0 writes and prints the calibration."""
    start = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    machine = _machine(request, device)
    with _progress() as show:
        measured = _Calibration(request, device, show).measure()
    took = f"{time.monotonic() - start:.1f} s of at most {request.minutes * 60:.1f}"
    machine = replace(machine, notes={**machine.notes, "measured in": took})
    if dist.get_rank() == 0:
        _finish(request, machine, measured)


class _Calibration:
    def __init__(self, request: Request, device: torch.device, show: Callable[[str], None]) -> None:
        self.bench, self.device, self.show = Bench(device), device, show
        on_gpu = device.type == "cuda"
        self.sizes = request.sizes or (ON_GPU if on_gpu else ON_CPU)
        self.dtype = getattr(torch, request.dtype or ("bfloat16" if on_gpu else "float32"))
        self.seconds, self.end = request.minutes * 60, time.monotonic()
        self.found = Measurements(dtype=str(self.dtype).removeprefix("torch."))

    def measure(self) -> Measurements:
        self.found.reserve_bytes = self._reserve()
        for name, measure in (
            ("products", self._products),
            ("attention", self._attention),
            ("memory", self._memory),
            ("link", self._links),
            ("layer", self._layer),
        ):
            self.show(name)
            self.end += _SHARES[name] * self.seconds
            measure(_SHARES[name] * self.seconds)
            gc.collect()
        self.show("done")
        return self.found

    def _reserve(self) -> float:
        """Return the largest memory use in bytes of a rank that has done almost no work."""
        torch.ones(64, 64, device=self.device) @ torch.ones(64, 64, device=self.device)
        dist.barrier()
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            held = total - free - torch.cuda.memory_reserved()
        else:
            held = psutil.Process().memory_info().rss
        return float(max(_gather(held)))

    def _products(self, budget: float) -> None:
        shapes = [(rows, inner, width) for rows, inner in self.sizes.products for width in self.sizes.widths]
        work = sum(r * k * w for r, k, w in shapes)
        for rows, inner, width in self._in_time(shapes):
            x, weight = self._random(rows, inner), self._random(width, inner)
            share = budget * (0.5 / len(shapes) + 0.5 * rows * inner * width / work)
            timing = self._timed(partial(F.linear, x, weight), share)
            self.found.products.append(Product(rows, inner, width, timing))

    def _attention(self, budget: float) -> None:
        s = self.sizes
        for length in self._in_time(s.lengths):
            for name, attend in self._attentions(length):
                flops = 2 * s.heads * 2 * s.head_dim * length**2 / 2  # half of the pairs, as in cost.py
                timing = self._timed(attend, budget / len(s.lengths))
                self.found.attention.append(Rate(f"{name} attention", f"{length} tokens", flops, timing))

    def _attentions(self, length: int) -> Iterator[tuple[str, Callable[[], object]]]:
        """Yield Transformer Engine's kernel where the package would use it, else torch's."""
        s = self.sizes
        if self.device.type == "cuda" and find_transformer_engine().usable:
            from transformer_engine.pytorch import DotProductAttention  # type: ignore[import-not-found]

            te = DotProductAttention(s.heads, s.head_dim, qkv_format="bshd", attn_mask_type="causal")
            qkv = [self._random(1, length, s.heads, s.head_dim) for _ in range(3)]
            yield "transformer engine's", lambda: te(*qkv)
            return
        q, k, v = (self._random(1, s.heads, length, s.head_dim) for _ in range(3))
        yield "torch's", lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def _memory(self, budget: float) -> None:
        a, b, out = (self._random(self.sizes.elements) for _ in range(3))
        timing = self._timed(lambda: torch.add(a, b, out=out), budget)
        self.found.memory.append(
            Rate("elementwise sum", f"{a.numel()} elements", 3.0 * a.numel() * a.element_size(), timing)
        )

    def _links(self, budget: float) -> None:
        """Measure links within the node, and between nodes with all GPUs of each node at once."""
        near, far = _link_groups()
        both = sum(size > 1 for _, size in (near, far))
        for (group, size), rates in ((near, self.found.link), (far, self.found.network)):
            if size > 1:
                self._collectives(group, size, rates, budget / both / 3 / len(self.sizes.messages))

    def _collectives(self, group: Any, size: int, rates: list[Rate], budget: float) -> None:
        """Measure collectives; rates use the byte counts that `cost.py` divides by the bandwidth."""
        ring = (size - 1) / size
        for num_bytes in self._in_time(self.sizes.messages):
            text = f"{num_bytes / 2**20:g} MiB"
            whole = torch.zeros(num_bytes // 2 // size * size, dtype=torch.bfloat16, device=self.device)
            local, sent = torch.zeros_like(whole[: whole.numel() // size]), 2.0 * whole.numel()
            gather = self._timed(partial(dist.all_gather_into_tensor, whole, local, group=group), budget)
            rates.append(Rate("all-gather", text, ring * sent, gather))
            reduce = self._timed(partial(dist.all_reduce, whole, group=group), budget)
            rates.append(Rate("all-reduce", text, 2 * ring * sent, reduce))
            message = self._timed(partial(_send_to_next, whole, group), budget)
            rates.append(Rate("message", text, sent, message))

    def _layer(self, budget: float) -> None:
        """Measure the time per layer as the difference between a deep and a shallow model."""
        with _tiny_models(self.dtype, self.device, layers=(2, 10)) as (few, many):
            timings = [self.bench.time(model, budget / 2, queued=True) for model in (few, many)]
        self.found.layer = max(0.0, (timings[1].seconds - timings[0].seconds) / 8), timings[1]

    def _in_time(self, sizes: Sequence[Size]) -> Iterator[Size]:
        """Yield the first size, and further ones until the budget is spent."""
        for i, size in enumerate(sizes):
            if i and self.bench.is_past(self.end):
                return
            yield size

    @torch.no_grad()
    def _timed(self, call: Callable[[], object], budget: float) -> Timing:
        return self.bench.time(call, budget)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)


def _send_to_next(tensor: torch.Tensor, group: Any) -> None:
    """Send `tensor` from each even rank of the group to the next rank."""
    rank = dist.get_rank(group)
    if rank % 2:
        dist.recv(tensor, group_src=rank - 1, group=group)
    elif rank + 1 < dist.get_world_size(group):
        dist.send(tensor, group_dst=rank + 1, group=group)


def _link_groups() -> tuple[tuple[Any, int], tuple[Any, int]]:
    """Return this rank's group within its node and its group across nodes (same local index), each with its size."""
    hosts = _gather(socket.gethostname())
    local_ranks = [hosts[:rank].count(host) for rank, host in enumerate(hosts)]
    local_groups = []
    for keys in (hosts, local_ranks):
        for key in dict.fromkeys(keys):  # all ranks must create all groups in the same order
            ranks = [rank for rank, k in enumerate(keys) if k == key]
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                local_groups.append((group, len(ranks)))
    return local_groups[0], local_groups[1]


def _gather(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def _tiny_models(
    dtype: torch.dtype, device: torch.device, layers: Sequence[int]
) -> Iterator[list[Callable[[], object]]]:
    """Yield forward passes of models with the given layer counts, so narrow that only per-layer overhead counts."""
    from megatron_fipo.model.build import build_policy
    from megatron_fipo.parallel import topology as topologies
    from megatron_fipo.scaling.cost.model_shapes import make_shape, plain_architecture

    parallel = ParallelConfig(world_size=dist.get_world_size())
    model_config = ModelConfig(dtype="bfloat16" if dtype == torch.bfloat16 else "float32")
    config = replace(Config(), parallel=parallel, model=model_config)
    topology = topologies.initialize(parallel, seed=1)
    try:
        passes: list[Callable[[], object]] = []
        for count in layers:
            shape = make_shape(count, hidden=128, ffn=256, heads=2, vocab=256, model_type="qwen2", qkv_bias=True)
            (model,) = build_policy(plain_architecture(shape), config, topology)
            for parameter in model.parameters():
                torch.nn.init.constant_(parameter, 0.01)
            passes.append(torch.no_grad()(lambda model=model: model(_few_tokens(device))))
        yield passes
    finally:
        topologies.destroy()


def _few_tokens(device: torch.device, count: int = 16) -> Any:
    """Return one short sequence, packed as in training."""
    from megatron_fipo.batch import MicroBatch

    positions = torch.arange(count, device=device)
    ends = torch.tensor([0, count], device=device)
    nothing = torch.zeros(count, device=device)
    return MicroBatch(
        input_ids=positions,
        position_ids=positions,
        cu_seqlens=ends.int(),
        padded_lengths=(count,),
        hidden_index=positions,
        targets=positions,
        places=positions,
        segment_offsets=ends,
        loss_mask=torch.ones(count, dtype=torch.bool, device=device),
        response_offsets=ends,
        advantages=nothing[:1],
        sequence_index=positions[:1],
        rollout_log_probs=nothing,
    )


# Machine, calibration file and output


def _known_gpu(gpu: str | None) -> str | None:
    """Return the GPU's name as spelled in `hardware.yaml`, or None."""
    return {name.lower(): name for name in hardware_files()["gpus"]}.get((gpu or "").lower())


def _machine(request: Request, device: torch.device) -> Machine:
    hosts = Counter(_gather(socket.gethostname()))
    if device.type == "cuda":
        called, memory = torch.cuda.get_device_name(), float(torch.cuda.mem_get_info()[1])
        found, group = name_of(called, memory), max(hosts.values())
    else:
        called, memory = _processor(), psutil.virtual_memory().total / max(hosts.values())
        found, group = None, _PROCESSES
    own = request.gpu or found or (re.sub(r"[^\w.-]+", "-", called).strip("-") if device.type == "cuda" else "cpu")
    name = _known_gpu(own)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    notes = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "hosts": ", ".join(f"{host} ({ranks} ranks)" for host, ranks in hosts.items()),
        "device": f"{called}, {torch.get_num_threads()} threads per rank",
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items() if v),
    }
    return Machine(name or own, name is not None, memory, group, notes)


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1) if found else platform.processor() or platform.machine()


def _finish(request: Request, machine: Machine, measured: Measurements) -> None:
    write_whole(request.out, render(machine, measured))
    console = Console(width=100, markup=False)
    for table in (_product_table(measured), _entry_table(machine, measured)):
        console.print(table)
    if (text := noise(measured)) is not None:
        console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)
    console.print(
        f"calibration of {machine.name}, {machine.notes['measured in']}: {request.out}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _product_table(measured: Measurements) -> Table:
    gemm = fit_gemm(measured.products)
    table = Table(title=f"matmuls in {measured.dtype}, TFLOP/s", box=SIMPLE_HEAD)
    for name in ("rows", "inner", "width", "measured", "fitted", "spread"):
        table.add_column(name, justify="right")
    for p in measured.products:
        rates = (f"{rate / 1e12:.4g}" for rate in (p.rate, p.flops / gemm.seconds(p)))
        table.add_row(str(p.rows), str(p.inner), str(p.width), *rates, f"{p.timing.spread:.1%}")
    return table


def _entry_table(machine: Machine, measured: Measurements) -> Table:
    table = Table(title="calibrated constants", box=SIMPLE_HEAD)
    for name in ("constant", "value", "measured from"):
        table.add_column(name, justify="right" if name == "value" else "left", overflow="fold")
    for path, value, source in entries(machine, measured):
        table.add_row(".".join(path[2:]), f"{value:.4g}" if isinstance(value, float) else str(value), source)
    return table


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the name of the measurement that starts."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=dist.get_rank() != 0, transient=True) as bar:
        task = bar.add_task("starting", total=len(_SHARES) + 1)

        def show(what: str) -> None:
            bar.update(task, advance=1, description=what)

        yield show
