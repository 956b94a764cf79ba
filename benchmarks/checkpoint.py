"""Cost of checkpoints in training: the pause of a save, and the speed of writing to disk.

    python benchmarks/checkpoint.py [--size tiny|small|large] [--layout one|tp2|pp2|dp2] [--rounds 5] [--directory DIR]

A step is one update as in training (forward, backward, clipping, Adam), without the rollouts that take most of a
real step: shares of a real one are smaller. Each round times, in turn, a plain step, a blocking save,
a raw write of the same bytes (sequentially from each rank's memory, with fsync), and an asynchronous
save with the steps that run beside it. `pause` is how long `save` and `poll` block training; `slowdown` is
the cost of the writers and of copy-on-write pages for the steps beside them. Prints a table, and as its
last line one JSON object with the same figures, medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_fipo import launch
from megatron_fipo.actor import FIPOActor
from megatron_fipo.checkpoint import Checkpointer
from megatron_fipo.config import CheckpointConfig, Config
from megatron_fipo.model.check import check_model
from megatron_fipo.parallel import topology as topologies
from small_policy import make_batch, make_config, make_model, show

LAYOUTS = {"one": {}, "tp2": {"tensor": 2}, "pp2": {"pipeline": 2}, "dp2": {"world_size": 2}}
SIZES = {"tiny": (128, 4), "small": (512, 8), "large": (1024, 12)}  # hidden size, layers
_BLOCK = 1 << 22  # bytes


def timed(action: Callable[[], Any]) -> float:
    """Return the seconds until all ranks have finished the action."""
    torch.cuda.synchronize()  # a barrier of the hosts does not wait for their devices
    dist.barrier()
    started = time.perf_counter()
    action()
    torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - started


def write_raw(path: Path, size: int) -> None:
    """Write as many bytes as in the rank's data file, from memory."""
    block = os.urandom(_BLOCK)
    with open(path, "wb", buffering=0) as stream:
        for start in range(0, size, _BLOCK):
            stream.write(block[: size - start])
        os.fsync(stream.fileno())


def measure(config: Config, rounds: int, directory: str, out: str) -> None:
    """Measure on one rank; rank 0 writes each round's results to `out`."""
    topology = topologies.initialize(config.parallel, seed=1)
    actor = FIPOActor(config, check_model(config), topology)
    batch = make_batch(actor)
    keep = CheckpointConfig(keep_last=1, keep_best=False)
    checkpointer = Checkpointer(Path(directory, "checkpoints"), keep, actor, topology)

    def step() -> None:
        with actor.training(), actor.training_step():
            actor.get_loss_and_metrics(batch, forward_only=False)

    def polled() -> float:
        return timed(checkpointer.poll)

    figures = []
    for number in range(rounds + 1):
        figure = {"step": timed(step)}
        figure["waited"] = timed(lambda n=2 * number: checkpointer.save(n, {}, wait=True))
        assert checkpointer.last is not None
        figure |= {"bytes": checkpointer.last.bytes, "waited_writing": checkpointer.last.writing}
        size = Path(directory, "checkpoints", f"step_{2 * number}", f"__{topology.rank}_0.distcp").stat().st_size
        raw = Path(directory, f"raw_{topology.rank}")
        figure["raw"] = timed(lambda file=raw, n=size: write_raw(file, n))
        raw.unlink()
        figure["pause"] = timed(lambda n=2 * number + 1: checkpointer.save(n, {}))
        beside = []
        while checkpointer.in_progress:
            beside.append(timed(step))
            figure["pause"] += polled()
        figure |= {"writing": checkpointer.last.writing, "first_step_beside": beside[0], "steps_beside": len(beside)}
        figures.append(figure)
    checkpointer.close()
    if topology.rank == 0:
        Path(out).write_text(json.dumps(figures[1:]))  # the first round is a warm-up


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="model size")
    parser.add_argument("--layout", choices=LAYOUTS, default="one")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after a warm-up round")
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="directory on the disk to measure")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory, prefix=".checkpoint-benchmark-") as directory:
        make_model(Path(directory), *SIZES[args.size])
        config = make_config(Path(directory), LAYOUTS[args.layout], "bfloat16")
        launch.run(measure, config.parallel, (config, args.rounds, directory, f"{directory}/result.json"))
        report(args, json.loads(Path(directory, "result.json").read_text()))


def report(args: argparse.Namespace, rounds: list[dict[str, Any]]) -> None:
    """Print the results."""

    def median(figure: Callable[[dict[str, Any]], float], digits: int = 4) -> float:
        return round(statistics.median(map(figure, rounds)), digits)

    figures = {
        "size": args.size,
        "layout": args.layout,
        "rounds": len(rounds),
        "megabytes": median(lambda r: r["bytes"] / 1e6, 1),
        "step_seconds": median(lambda r: r["step"]),
        "waited_pause_seconds": median(lambda r: r["waited"]),
        "waited_pause_share_of_step": median(lambda r: r["waited"] / r["step"]),
        "background_pause_seconds": median(lambda r: r["pause"]),
        "background_pause_share_of_step": median(lambda r: r["pause"] / r["step"]),
        "background_writing_seconds": median(lambda r: r["writing"]),
        "first_step_beside_slowdown": median(lambda r: r["first_step_beside"] / r["step"]),
        "steps_beside": median(lambda r: r["steps_beside"]),
        "save_megabytes_per_second": median(lambda r: r["bytes"] / r["waited_writing"] / 1e6, 1),
        "raw_megabytes_per_second": median(lambda r: r["bytes"] / r["raw"] / 1e6, 1),
        "save_over_raw_speed": median(lambda r: r["raw"] / r["waited_writing"]),
    }
    show("What a checkpoint costs training", figures)


if __name__ == "__main__":
    main()
