"""Update with sequence chunks against one with whole micro-batches: seconds, peak memory, and the loss.

    python benchmarks/sequence_chunks.py [--stages 2] [--chunks 1,2,4,8] [--tokens 2048] [--micro-batches 4]
        [--hidden 512] [--layers 8] [--dtype float32|bfloat16] [--repeats 5]

One rank a stage; each micro-batch is one response of `--tokens`. The numbers of chunks are timed in turn, forward and
backward of an update, and the ratios are medians against the first of them. Memory is that of the fullest rank in a
first update of its own process: the device's, or without a GPU the growth of resident memory. `ideal` is the ratio of
the idle shares alone, of equal stages and free messages: (m n + p - 1) / n over that of the first. On one card, in a
1.5B model's shape: --stages 1 --hidden 1536 --layers 28 --dtype bfloat16 --chunks 1,4,8 --tokens 16384.
Prints a table, and as its last line one JSON object with the same figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_fipo import launch
from megatron_fipo.actor import FIPOActor
from megatron_fipo.batch import Rollouts, TrainBatch
from megatron_fipo.config import Config
from megatron_fipo.model.check import check_model
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.parallel.collectives import gather
from megatron_fipo.scaling.measure.peak_memory import PeakMemory
from small_policy import PROMPT, VOCABULARY, make_config, make_model


def configure(directory: Path, args: argparse.Namespace, chunks: int) -> Config:
    """Return the config of an update with so many chunks."""
    config = make_config(directory, {"pipeline": args.stages}, args.dtype)
    return replace(
        config,
        model=replace(config.model, overrides={"max_position_embeddings": args.tokens + PROMPT}),
        parallel=replace(config.parallel, sequence_chunks=chunks),
        rollout=replace(config.rollout, max_response_tokens=args.tokens),
        trainer=replace(config.trainer, tokens_per_micro_batch=args.tokens + PROMPT),
    )


def make_long_batch(actor: FIPOActor, tokens: int, micro_batches: int) -> TrainBatch:
    """Return micro-batches of one random response each, with old log-probabilities slightly off the policy's."""
    generator = torch.Generator().manual_seed(0)
    rollouts = Rollouts.from_responses(
        ids=range(micro_batches),
        prompts=torch.randint(VOCABULARY, (micro_batches, PROMPT), generator=generator).tolist(),
        responses=torch.randint(VOCABULARY, (micro_batches, tokens), generator=generator).tolist(),
        log_probs=[[0.0] * tokens] * micro_batches,
        truncated=[False] * micro_batches,
    ).replace(advantages=torch.randn(micro_batches, generator=generator))
    batch = TrainBatch(tuple(actor.pack(rollouts, [i]) for i in range(micro_batches)))
    old = [x + 0.05 * torch.randn(x.shape, generator=generator) for x in actor.log_probs(batch)]
    return batch.with_token_values(old_log_probs=old)


def measure_memory(config: Config, tokens: int, micro_batches: int, out: str) -> None:
    """Measure on one rank; rank 0 writes the loss and the peak bytes of the fullest rank to `out`."""
    topology = topologies.initialize(config.parallel, seed=1)
    actor = FIPOActor(config, check_model(config), topology)
    batch = make_long_batch(actor, tokens, micro_batches)
    actor.prepare_for_training_step()
    memory = PeakMemory()
    loss, _ = actor.get_loss_and_metrics(batch, forward_only=False)
    peak = max(gather(memory.read()))
    if topology.rank == 0:
        Path(out).write_text(json.dumps({"loss": loss, "peak": peak}))


def measure_time(configs: list[Config], tokens: int, micro_batches: int, repeats: int, out: str) -> None:
    """Measure on one rank; rank 0 writes the seconds of each number of chunks to `out`."""
    topology = topologies.initialize(configs[0].parallel, seed=1)
    arch = check_model(configs[0])
    actors = [FIPOActor(config, arch, topology) for config in configs]
    batch = make_long_batch(actors[0], tokens, micro_batches)
    seconds: list[list[float]] = [[] for _ in configs]
    for _ in range(repeats + 1):
        for actor, times in zip(actors, seconds, strict=True):
            actor.prepare_for_training_step()
            torch.cuda.synchronize()
            dist.barrier()
            started = time.perf_counter()
            actor.get_loss_and_metrics(batch, forward_only=False)
            torch.cuda.synchronize()
            dist.barrier()
            times.append(time.perf_counter() - started)
    if topology.rank == 0:
        Path(out).write_text(json.dumps([times[1:] for times in seconds]))  # the first update is a warm-up


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--chunks", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, default=2048, help="of each response")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5, help="timed updates of each, after a warm-up")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        make_model(Path(directory), args.hidden, args.layers)
        configs = [configure(Path(directory), args, chunks) for chunks in args.chunks]
        out, memory = Path(directory, "result.json"), []
        for config in configs:
            launch.run(measure_memory, config.parallel, (config, args.tokens, args.micro_batches, str(out)))
            memory.append(json.loads(out.read_text()))
        timed = (configs, args.tokens, args.micro_batches, args.repeats, str(out))
        launch.run(measure_time, configs[0].parallel, timed)
        seconds = json.loads(out.read_text())
    report(args, seconds, memory)


def report(args: argparse.Namespace, seconds: list[list[float]], memory: list[dict[str, float]]) -> None:
    """Print the results."""
    m, p, rows = args.micro_batches, args.stages, []
    for n, times, figures in zip(args.chunks, seconds, memory, strict=True):
        rows.append(
            {
                "chunks": n,
                "seconds": round(statistics.median(times), 4),
                "ratio": round(statistics.median(a / b for a, b in zip(times, seconds[0], strict=True)), 4),
                "ideal": round((m * n + p - 1) / n / ((m * args.chunks[0] + p - 1) / args.chunks[0]), 4),
                "peak_mb": round(figures["peak"] / 1e6, 1),
                "peak_ratio": round(figures["peak"] / memory[0]["peak"], 3),
                "loss": figures["loss"],
            }
        )
    table = Table(*rows[0], title=f"update of {m} responses of {args.tokens} tokens, {p} stages, {args.dtype}")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=100).print(table)
    print(json.dumps({"stages": p, "micro_batches": m, "tokens": args.tokens, "dtype": args.dtype, "rows": rows}))


if __name__ == "__main__":
    main()
