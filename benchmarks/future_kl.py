"""Future-KL scan and fused loss: time, and share of the machine's copy bandwidth.

    python benchmarks/future_kl.py [--device cpu] [--sizes 8x20480 64x4096 mix 25M] [--seconds 2] [--skip-published]

For each size: the compiled scan, the compiled loss (sum, gradient and all metrics), and the share of the copy
bandwidth measured in the same run with the same threads, out of cache. Both move 13 bytes per token: two log-probs
and a mask byte read, one float written. Sizes that fit the cache may exceed 100%. Ratios are relative to
(a) the published algorithm for the scan, padded rows times a decay matrix in chunks, O(T^2);
(b) the torch reference of the loss, forward and backward with metrics.

Times are minima over `--seconds` of calls, at least three; (a) runs once. On CPU, glibc is configured to keep freed
memory (`KEEP_FREED`): copies and ops write to mapped memory, as with torch's
CUDA allocator. With `--fresh-memory` each call of an op includes the first touch of its outputs; also for (b).
Run it on an idle machine; see `load_before` in the last line.

On a GPU (`--device cuda --sizes 8x20480 64x4096 mix 25M 25M-mix`) the copy is on the device, and two more
results are printed: kernels launched by the loss of a micro-batch of 20,480 tokens, and the memory that the loss of
25M tokens uses beside its inputs and outputs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megatron_fipo.algorithm import FIPOLossConfig, fipo_loss
from megatron_fipo.ops import compiled_summary

BYTES_PER_TOKEN = 13
COPY_ELEMENTS = 64 * 2**20  # 256 MiB each way, beyond any cache
PUBLISHED_CHUNK = 128  # rows of the decay matrix at a time
PUBLISHED_LIMIT = 2**40  # B T^2 multiply-adds, a few minutes on two cores; above, (a) is skipped
KEEP_FREED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**28)}
QUEUE_CYCLES = 20_000_000  # GPU sleep while launches queue up, about 10 ms
CONFIG = FIPOLossConfig()


@dataclass
class Batch:
    log_probs: Tensor  # [N]
    old_log_probs: Tensor  # [N]
    advantages: Tensor  # [S]
    mask: Tensor  # [N] bool
    lengths: list[int]

    @property
    def offsets(self) -> Tensor:
        return torch.tensor([0, *self.lengths], device=self.mask.device).cumsum(0)

    def inputs(self) -> tuple[Tensor, ...]:
        return self.log_probs, self.old_log_probs, self.advantages, self.mask, self.offsets


def mixed_lengths(sequences: int, tokens: int, shortest: int = 250, longest: int = 20480) -> list[int]:
    """Return lengths spread evenly on a log scale between the two, shuffled, and scaled to sum to `tokens`."""
    scale = torch.logspace(
        torch.log10(torch.tensor(float(shortest))), torch.log10(torch.tensor(float(longest))), sequences
    )
    order = torch.randperm(sequences, generator=torch.Generator().manual_seed(0))
    lengths = (scale[order] * tokens / scale.sum()).long().clamp(min=1)
    lengths[0] += tokens - lengths.sum()
    return lengths.tolist()


SIZES = {
    "1x20480": lambda: [20480],
    "80x256": lambda: [256] * 80,
    "8x20480": lambda: [20480] * 8,
    "64x4096": lambda: [4096] * 64,
    "mix": lambda: mixed_lengths(64, 262_144),
    "25M": lambda: [20480] * 1221,
    "25M-mix": lambda: mixed_lengths(4096, 25_000_000),
}


MICRO_BATCHES = {"1 x 20480": [20480], "80 x 256": [256] * 80}


def make_batch(lengths: list[int], device: str) -> Batch:
    """Return a batch with log-ratios of standard deviation 0.05 and 5% masked tokens, like a late mini-batch."""
    generator = torch.Generator(device).manual_seed(0)
    size = sum(lengths)
    old = -torch.rand(size, generator=generator, device=device)
    log_probs = old + 0.05 * torch.randn(size, generator=generator, device=device)
    mask = torch.rand(size, generator=generator, device=device) < 0.95
    advantages = torch.randn(len(lengths), generator=generator, device=device)
    return Batch(log_probs, old, advantages, mask, lengths)


def seconds(function: Callable[[], Any], device: str, budget: float) -> float:
    """Return the minimum time of a call within `budget` seconds, after a warm-up call.

    On CUDA, measured between events with launches queued while the device sleeps, so that the host is not measured.
    """
    function()
    times: list[float] = []
    until = time.perf_counter() + budget
    while len(times) < 3 or time.perf_counter() < until:
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(QUEUE_CYCLES)
            begin.record()
            function()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
    return min(times)


def copy_bandwidth(device: str, budget: float) -> float:
    """Return the bytes per second of an out-of-cache copy, counting reads and writes."""
    source, target = (torch.ones(COPY_ELEMENTS, device=device) for _ in range(2))
    return 2 * source.numel() * source.element_size() / seconds(lambda: target.copy_(source), device, budget)


def published_scan(batch: Batch) -> Callable[[], Tensor]:
    """Return the published algorithm: padded [B, T] times the transposed decay matrix, in chunks of its rows."""
    rows = [part.nan_to_num() for part in (batch.log_probs - batch.old_log_probs).split(batch.lengths)]
    values = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [B, T]
    masks = torch.nn.utils.rnn.pad_sequence(batch.mask.split(batch.lengths), batch_first=True)
    gamma = 2.0 ** (-1.0 / CONFIG.half_life)

    def scan() -> Tensor:
        shift = values * masks
        out = torch.zeros_like(shift)
        positions = torch.arange(shift.shape[1], device=shift.device)
        for start in range(0, shift.shape[1], PUBLISHED_CHUNK):
            chunk = positions[start : start + PUBLISHED_CHUNK]
            distance = positions[None, :] - chunk[:, None]  # [chunk, T]
            decay = torch.where(distance >= 0, gamma ** distance.clamp(min=0).float(), 0.0)
            out[:, chunk] = shift @ decay.T
        return out

    return scan


def loss_and_backward(batch: Batch, backend: str) -> Callable[[], Tensor]:
    """Return a function that runs the loss and its backward pass."""
    log_probs = batch.log_probs.clone().requires_grad_()
    inputs = batch.inputs()[1:]

    def step() -> Tensor:
        out = fipo_loss(log_probs, *inputs, CONFIG, backend=backend)  # type: ignore[arg-type]
        return torch.autograd.grad(out.loss_sum, log_probs)[0]

    return step


def fused_loss(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Run the compiled op: loss sum, gradient, metrics, histograms, vetoes."""
    low, high = CONFIG.influence_bounds
    outputs: tuple[Tensor, ...] = torch.ops.megatron_fipo.fipo_loss(
        *inputs,
        None,
        half_life=CONFIG.half_life,
        influence_low=low,
        influence_high=high,
        clip_ratio_low=CONFIG.clip_ratio_low,
        clip_ratio_high=CONFIG.clip_ratio_high,
        dual_clip=CONFIG.dual_clip,
        safety_threshold=CONFIG.safety_threshold,
        log_ratio_clamp=CONFIG.log_ratio_clamp,
        norm_length=CONFIG.norm_length,
        max_dual_clipped=1,
        aggregation=CONFIG.aggregation,
    )
    return outputs


def launches(batch: Batch) -> dict[str, int]:
    """Return the kernels that one loss launches, with their counts."""
    inputs = batch.inputs()
    fused_loss(inputs)  # warm-up
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        fused_loss(inputs)
        torch.cuda.synchronize()
    return dict(Counter(event.name for event in profiler.events() if event.device_type == DeviceType.CUDA))


def extra_memory(batch: Batch) -> int:
    """Return the peak device memory of one loss beside its inputs and outputs."""
    inputs = batch.inputs()
    fused_loss(inputs)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = fused_loss(inputs)
    peak = torch.cuda.max_memory_allocated() - before
    return peak - sum(tensor.numel() * tensor.element_size() for tensor in outputs)


def show_cuda_figures() -> dict[str, Any]:
    """Print and return the CUDA-only results."""
    launched = {name: launches(make_batch(lengths, "cuda")) for name, lengths in MICRO_BATCHES.items()}
    for name, counts in launched.items():
        print(f"launched by the loss of {name}: " + ", ".join(f"{n} x {kernel}" for kernel, n in counts.items()))
    extra = extra_memory(make_batch(SIZES["25M"](), "cuda"))
    print(f"memory beside inputs and outputs, 25M tokens: {extra / 2**20:.2f} MiB")
    return {"launches": launched, "extra_bytes_25M": extra}


def measure(
    name: str, device: str, budget: float, copy: float, with_published: bool, with_reference: bool = True
) -> dict[str, Any]:
    """Measure one size."""
    batch = make_batch(SIZES[name](), device)
    tokens = batch.mask.numel()
    inputs = batch.inputs()
    log_probs, old, _, mask, offsets = inputs
    scan_op, log_dual_clip = torch.ops.megatron_fipo.future_kl_scan, math.log(CONFIG.dual_clip)
    scan = seconds(
        lambda: scan_op(log_probs, old, mask, offsets, CONFIG.half_life, CONFIG.log_ratio_clamp, log_dual_clip),
        device,
        budget,
    )
    fused = seconds(lambda: fused_loss(inputs), device, budget)
    whole = seconds(loss_and_backward(batch, "compiled"), device, budget)
    reference = seconds(loss_and_backward(batch, "reference"), device, budget) if with_reference else None
    padded_work = len(batch.lengths) * max(batch.lengths) ** 2
    published = (
        seconds_once(published_scan(batch), device) if with_published and padded_work < PUBLISHED_LIMIT else None
    )
    moved = BYTES_PER_TOKEN * tokens
    return {
        "size": name,
        "tokens": tokens,
        "sequences": len(batch.lengths),
        "scan_ms": scan * 1e3,
        "scan_gb_per_s": moved / scan / 1e9,
        "scan_share_of_copy": moved / scan / copy,
        "fused_ms": fused * 1e3,
        "fused_gb_per_s": moved / fused / 1e9,
        "fused_share_of_copy": moved / fused / copy,
        "loss_and_backward_ms": whole * 1e3,
        "reference_ms": reference and reference * 1e3,
        "reference_over_compiled": reference and reference / whole,
        "published_ms": published and published * 1e3,
        "published_over_scan": published and published / scan,
    }


def seconds_once(function: Callable[[], Any], device: str) -> float:
    """Return the seconds of a single call."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def show(rows: list[dict[str, Any]], copy: float) -> None:
    """Print the results."""
    table = Table(title=f"Future-KL; copy {copy / 1e9:.1f} GB/s; {compiled_summary()}")
    for heading in ("size", "scan ms", "GB/s", "of copy", "fused ms", "GB/s", "of copy", "(a) / scan", "(b) / loss"):
        table.add_column(heading, justify="right")
    for row in rows:
        published = row["published_over_scan"]
        table.add_row(
            row["size"],
            f"{row['scan_ms']:.3f}",
            f"{row['scan_gb_per_s']:.1f}",
            f"{row['scan_share_of_copy']:.0%}",
            f"{row['fused_ms']:.3f}",
            f"{row['fused_gb_per_s']:.1f}",
            f"{row['fused_share_of_copy']:.0%}",
            f"{published:,.0f}" if published else "not run",
            f"{row['reference_over_compiled']:.1f}",
        )
    Console(width=130).print(table)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["8x20480", "64x4096", "mix", "25M"])
    parser.add_argument("--seconds", type=float, default=2.0, help="time budget per measurement")
    parser.add_argument("--fresh-memory", action="store_true", help="let the allocator return freed memory (CPU)")
    parser.add_argument("--skip-published", action="store_true", help="skip (a), about a minute on two cores")
    args = parser.parse_args()
    if args.device == "cpu" and not args.fresh_memory and not KEEP_FREED.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_FREED})
    load_before = os.getloadavg()[0]
    copy = copy_bandwidth(args.device, args.seconds)
    rows = [measure(name, args.device, args.seconds, copy, not args.skip_published) for name in args.sizes]
    show(rows, copy)
    figures = {
        "device": args.device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_before": load_before,
        "fresh_memory": args.fresh_memory,
        "copy_gb_per_s": copy / 1e9,
        "rows": rows,
        **(show_cuda_figures() if args.device == "cuda" else {}),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
