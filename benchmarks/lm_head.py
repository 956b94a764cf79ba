"""Chunked LM head, log-probability and entropy: peak memory, and time relative to the naive way and a lower bound.

    python benchmarks/lm_head.py [--tokens 8192] [--vocab 151936] [--hidden 896] [--compare-tokens 1024]
        [--device cuda --dtype bfloat16]

Each measurement runs in a new process. Peaks exclude inputs and gradients, which exist before, as
when gradients accumulate over micro-batches: the naive way's addition to the old weight gradient counts; ours
adds to Megatron-Core's float32 buffer, as in training.
On Linux CPUs a peak is VmHWM, reset just before; on CUDA it is torch.cuda.max_memory_allocated.
Naive is F.linear -> float32 -> log_softmax -> gather and entropy, under autograd, with the same float32 head.
The lower bound is four matmuls (forward, its recomputation, two gradients) at the rate this machine reaches in
the same run with the three matmuls of the naive way, unchunked and into preallocated memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_fipo.parallel.lm_head import token_log_probs_and_entropy

Inputs = tuple[Tensor, Tensor, Tensor]


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the naive way: all logits at once."""
    log_p = torch.log_softmax(F.linear(hidden, weight).float(), dim=-1)  # [R, V]
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(dim=-1)


def chunked(args: argparse.Namespace) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the chunked head as a function."""

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return token_log_probs_and_entropy(
            hidden,
            weight,
            targets,
            vocab_start=0,
            vocab_size=args.vocab,
            temperature=1.0,
            group=None,
            chunk_tokens=args.chunk_tokens,
            fp32_logits=False,
        )

    return call


def make_inputs(args: argparse.Namespace, tokens: int) -> Inputs:
    """Return hidden [R, H], weight [V, H] and targets [R]; logits of standard deviation about 1."""
    to = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    hidden = torch.randn(tokens, args.hidden, **to).requires_grad_()
    weight = torch.randn(args.vocab, args.hidden, **to).mul_(args.hidden**-0.5).requires_grad_()
    weight.main_grad = torch.ones_like(weight, dtype=torch.float32)  # written, so that its pages are mapped
    return hidden, weight, torch.randint(args.vocab, (tokens,), device=args.device)


def forward_backward(function: Callable[..., tuple[Tensor, Tensor]], inputs: Inputs) -> None:
    """Run forward and backward once."""
    log_probs, entropy = function(*inputs)
    (log_probs.mean() + 0.1 * entropy.mean()).backward()


def memory_bytes(field: str) -> int:
    """Return VmRSS or VmHWM of this process; ru_maxrss survives exec, so would include the parent's peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure_peak(
    args: argparse.Namespace, function: Callable[..., tuple[Tensor, Tensor]], tokens: int
) -> dict[str, Any]:
    """Return the peak bytes of forward + backward beyond the inputs and their gradients."""
    inputs = make_inputs(args, tokens)
    for tensor in inputs[:2]:
        tensor.grad = torch.ones_like(tensor)  # written, so that its pages are mapped
    # The first few rows initialize thread pools and libraries.
    forward_backward(naive, make_inputs(argparse.Namespace(**vars(args) | {"vocab": 64}), 8))
    cuda = args.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = torch.cuda.memory_allocated() if cuda else memory_bytes("VmRSS")
    forward_backward(function, inputs)
    peak = torch.cuda.max_memory_allocated() if cuda else memory_bytes("VmHWM")
    return {"peak_bytes": peak - before, "weight_bytes": inputs[1].nbytes}


def seconds(args: argparse.Namespace, call: Callable[[], None]) -> tuple[float, float]:
    """Return wall and CPU seconds of one call, with the device's queue empty before and after."""
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure_time(args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """Alternate ours, naive and the plain matmuls; ratios are medians over rounds of the ratio within a round."""
    inputs, ours = make_inputs(args, tokens), chunked(args)
    hidden, weight = inputs[0].detach(), inputs[1].detach()
    logits, grad_hidden, grad_weight = hidden @ weight.T, torch.zeros_like(hidden), torch.zeros_like(weight)

    def products() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        torch.mm(logits.T, hidden, out=grad_weight)

    calls = {
        "ours": lambda: forward_backward(ours, inputs),
        "naive": lambda: forward_backward(naive, inputs),
        "products": products,
    }
    rounds = [{name: seconds(args, call) for name, call in calls.items()} for _ in range(args.rounds + 1)][1:]

    def ratio(over: str, under: str, clock: int) -> float:
        return statistics.median(one[over][clock] / one[under][clock] for one in rounds)

    medians = {name: statistics.median(one[name][0] for one in rounds) for name in calls}
    product_flops = 2 * tokens * args.vocab * args.hidden
    return {
        "ours_seconds": medians["ours"],
        "naive_seconds": medians["naive"],
        "ratio_wall": ratio("ours", "naive", 0),
        "ratio_cpu_time": ratio("ours", "naive", 1) if args.device == "cpu" else None,
        "product_gflops_per_second": 3 * product_flops / medians["products"] / 1e9,
        "floor_seconds": medians["products"] * 4 / 3,
        "share_of_floor": ratio("products", "ours", 0) * 4 / 3,
    }


def run_worker(args: argparse.Namespace) -> dict[str, Any]:
    """Run one measurement in a worker process."""
    torch.manual_seed(1)
    torch.set_num_threads(args.threads)
    if args.worker == "time":
        return measure_time(args, args.compare_tokens)
    if args.worker == "peak-naive":
        return measure_peak(args, naive, args.compare_tokens)
    return measure_peak(args, chunked(args), args.tokens)


def in_fresh_process(worker: str) -> dict[str, Any]:
    """Run a worker in a new process."""
    command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--worker", worker]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def machine(device: str) -> str:
    """Return the name of the machine."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()}-core {os.uname().machine.replace('_', '-')} CPU"


def show(figures: dict[str, Any]) -> None:
    """Print the results."""
    at_full = f"{figures['tokens']:,} tokens"
    at_compare = f"{figures['compare_tokens']:,} tokens"
    table = Table(
        title=f"LM head, {figures['vocab']:,} x {figures['hidden']}, {figures['dtype']}, "
        f"chunks of {figures['chunk_tokens']}; {figures['machine']}, {figures['threads']} threads"
    )
    for column in ("what", "size", "value"):
        table.add_column(column, justify="right" if column == "value" else "left")
    gigabytes = "{:.2f} GB".format
    table.add_row("peak above inputs and gradients, ours", at_full, gigabytes(figures["ours_peak_bytes"] / 1e9))
    table.add_row("  naive", at_compare, gigabytes(figures["naive_peak_bytes"] / 1e9))
    projected = gigabytes(figures["naive_projected_bytes"] / 1e9)
    table.add_row("  naive, projected: measured x tokens / tokens, not run", at_full, projected)
    table.add_row("forward + backward, ours", at_compare, f"{figures['ours_seconds']:.2f} s")
    table.add_row("  naive", at_compare, f"{figures['naive_seconds']:.2f} s")
    table.add_row("ours / naive, wall (median of pairs)", at_compare, f"{figures['ratio_wall']:.2f}")
    if figures["ratio_cpu_time"] is not None:
        table.add_row("ours / naive, CPU time (median of pairs)", at_compare, f"{figures['ratio_cpu_time']:.2f}")
    rate = f"{figures['floor_seconds']:.2f} s at {figures['product_gflops_per_second']:.0f} GFLOP/s"
    table.add_row("floor: four matrix products", at_compare, rate)
    table.add_row("share of the floor reached (floor / ours)", at_compare, f"{figures['share_of_floor']:.0%}")
    if figures["load_average"] is not None:
        table.add_row("1-minute load average before the run", "", f"{figures['load_average']:.1f}")
    Console(width=110).print(table)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="rows for the chunked head's peak memory")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument(
        "--compare-tokens", type=int, default=1024, help="rows for the comparison, where the naive way fits"
    )
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="dtype of all inputs")
    parser.add_argument("--worker", choices=["peak-ours", "peak-naive", "time"], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Run the benchmark."""
    args = parse_arguments()
    if args.worker:
        print(json.dumps(run_worker(args)))
        return
    figures = {key: value for key, value in vars(args).items() if key != "worker"}
    figures |= {"machine": machine(args.device), "torch": torch.__version__}
    figures["load_average"] = os.getloadavg()[0] if args.device == "cpu" else None
    figures |= in_fresh_process("time")
    naive_peak = in_fresh_process("peak-naive")["peak_bytes"]
    ours = in_fresh_process("peak-ours")
    figures |= {
        "naive_peak_bytes": naive_peak,
        "naive_projected_bytes": naive_peak * args.tokens // args.compare_tokens,
    }
    figures |= {"ours_peak_bytes": ours.pop("peak_bytes"), **ours}
    show(figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
