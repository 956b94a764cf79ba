"""All GPU-dependent performance in one table, in about 4 minutes on one GPU.

    python benchmarks/gpu.py [--model 1.5b|0.5b|7b-8-layers|DIR] [--parts loss head update deterministic servers]
    python benchmarks/gpu.py --toy        # the same code on the CPU, in seconds, with meaningless numbers

loss: fused loss of micro-batches of 20,480 tokens and of 25M tokens, its share of the copy bandwidth, launches.
head: LM head, log-probabilities and entropy, forward and backward, relative to four matmuls of its size; its memory.
update: forward, backward and Adam of a policy of random weights, with Transformer Engine off and on: seconds, model
FLOP/s and MFU, peak memory; FIPO relative to language modelling with the same head, and to
Megatron's own step with Megatron's own head and cross-entropy; old log-probabilities; Adam's state to the host and
back; the pause of a checkpoint. `first_log_ratio_abs_max` must be 0.
deterministic: cost of run.deterministic relative to `update`, and whether repeated updates had the same bits.
servers: weight updates of vLLM by transport (--transports ipc file) relative to a copy of the same bytes; tokens/s
relative to vLLM alone. Half of the time.

Prints a table, and as its last line one JSON object with the same results; unavailable parts are named there.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_fipo.config import RunConfig
from megatron_fipo.parallel import device as devices
from on_gpu import kernels, servers, update
from on_gpu.settings import GROUP, Settings
from small_policy import show

PARTS: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "loss": kernels.fused_loss,
    "head": kernels.head,
    "update": update.updates,
    "deterministic": update.deterministic,
    "servers": servers.servers,
}

TRANSPORTS = {"cuda": ("ipc", "file"), "cpu": ("file", "gloo")}


@contextmanager
def one_rank(on_gpu: bool) -> Iterator[None]:
    """Set this process up as the only rank."""
    devices.set_up(0 if on_gpu else None, RunConfig().deterministic)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1.5b", help="model shape, or directory with a config.json")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per micro-batch")
    parser.add_argument("--sequences", type=int, default=32, help=f"sequences per update; a multiple of {GROUP}")
    parser.add_argument("--lengths", default="p50=750,p90=2000,p100=8000", help="sequence lengths")
    parser.add_argument("--steps", type=int, default=3, help="timed updates, after a warm-up update")
    parser.add_argument("--seconds", type=float, default=1.0, help="time budget per measurement of the loss")
    parser.add_argument("--lm-head-chunk", type=int, default=4096, help="model.lm_head_chunk_tokens")
    parser.add_argument(
        "--transports", nargs="+", help="weight transports to vLLM: ipc or file, on the CPU file or gloo"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=None,
        help="directory for a checkpoint of 14 bytes per parameter; default: /tmp",
    )
    parser.add_argument("--toy", action="store_true", help="a tiny model, on the CPU unless --device is given")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda, or cpu with --toy")
    arguments = parser.parse_args()
    if arguments.toy:
        arguments.model, arguments.tokens, arguments.lengths = "toy", 512, "p50=60,p100=300"
        arguments.sequences, arguments.seconds, arguments.steps = 16, 0.02, min(arguments.steps, 2)
    arguments.device = arguments.device or ("cpu" if arguments.toy else "cuda")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is available; --toy runs the same code on the CPU")
    if arguments.device == "cpu" and torch.cuda.is_available():
        parser.error("Megatron uses a GPU if there is one: hide it with CUDA_VISIBLE_DEVICES= for --device cpu")
    if unknown := set(arguments.transports or ()) - set(TRANSPORTS[arguments.device]):
        parser.error(f"--transports {' '.join(unknown)}: must be among {' '.join(TRANSPORTS[arguments.device])}")
    if arguments.sequences < GROUP or arguments.sequences % GROUP or arguments.steps < 1:
        parser.error(f"--sequences must be a multiple of {GROUP}, and --steps at least 1")
    return arguments


def main() -> None:
    """Run the benchmark."""
    arguments = parse_arguments()
    on_gpu = arguments.device == "cuda"
    figures: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0) if on_gpu else f"{os.cpu_count()}-core {platform.machine()} CPU",
        "model": arguments.model,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="gpu-benchmark-") as directory:
        settings = Settings(
            device=arguments.device,
            model=arguments.model,
            tokens=arguments.tokens,
            sequences=arguments.sequences,
            lengths=arguments.lengths,
            steps=arguments.steps,
            seconds=arguments.seconds,
            directory=Path(directory),
            transports=tuple(arguments.transports or [TRANSPORTS[arguments.device][0]]),
            lm_head_chunk=arguments.lm_head_chunk,
        )
        with one_rank(on_gpu):
            for part in arguments.parts:
                begun = time.monotonic()
                figures |= PARTS[part](settings)
                if {"update_seconds", "update_deterministic_seconds"} <= figures.keys():
                    ratio = figures["update_deterministic_seconds"] / figures["update_seconds"]
                    figures["update_deterministic_over_default"] = ratio
                figures[f"{part}_took_seconds"] = time.monotonic() - begun
    figures["took_seconds"] = time.monotonic() - started
    show("One GPU" if on_gpu else "The GPU benchmark on the CPU", {n: _rounded(v) for n, v in figures.items()})


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
