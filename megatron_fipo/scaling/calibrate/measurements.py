"""Measurements of one calibration: matmuls, attention, memory, links, and the overhead per layer.

Each gets a fixed share of the time budget, which limits repetitions and sizes.
"""

from __future__ import annotations

import gc
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_fipo.fused_kernels import find_transformer_engine
from megatron_fipo.parallel.collectives import gather
from megatron_fipo.scaling.calibrate.bench import Bench, Timing
from megatron_fipo.scaling.calibrate.fit import Matmul, Measurements, Rate
from megatron_fipo.scaling.calibrate.layer_overhead import narrow_models
from megatron_fipo.scaling.calibrate.request import ON_CPU, ON_GPU, Request

# Of the time budget; the rest is slack
SHARES = {"matmuls": 0.3, "attention": 0.12, "memory": 0.08, "link": 0.2, "layer": 0.1}
Size = TypeVar("Size")


class Calibration:
    """All measurements on this rank. Collective over the default process group."""

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
            ("matmuls", self._matmuls),
            ("attention", self._attention),
            ("memory", self._memory),
            ("link", self._links),
            ("layer", self._layer),
        ):
            self.show(name)
            self.end += SHARES[name] * self.seconds
            measure(SHARES[name] * self.seconds)
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
        return float(max(gather(held)))

    def _matmuls(self, budget: float) -> None:
        shapes = [(rows, inner, width) for rows, inner in self.sizes.matmuls for width in self.sizes.widths]
        work = sum(r * k * w for r, k, w in shapes)
        for rows, inner, width in self._in_time(shapes):
            x, weight = self._random(rows, inner), self._random(width, inner)
            share = budget * (0.5 / len(shapes) + 0.5 * rows * inner * width / work)
            timing = self._timed(partial(F.linear, x, weight), share)
            self.found.matmuls.append(Matmul(rows, inner, width, timing))

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
        with narrow_models(self.dtype, self.device, layers=(2, 10)) as (few, many):
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
    hosts = gather(socket.gethostname())
    local_ranks = [hosts[:rank].count(host) for rank, host in enumerate(hosts)]
    local_groups = []
    for keys in (hosts, local_ranks):
        for key in dict.fromkeys(keys):  # all ranks must create all groups in the same order
            ranks = [rank for rank, k in enumerate(keys) if k == key]
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                local_groups.append((group, len(ranks)))
    return local_groups[0], local_groups[1]
