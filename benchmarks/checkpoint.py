"""What a checkpoint costs training: the pause of a save, and how fast its bytes reach the disk.

    python benchmarks/checkpoint.py [--size tiny|small|large] [--layout one|tp2|pp2|dp2] [--rounds 5] [--directory DIR]

A step is one update as training does it (forward, backward, clipping, Adam), without the rollouts that take most of a
real step: shares of a real one are smaller. Each round times, in turn, a plain step, a save that training waits for,
the same bytes written raw (every rank writes as many from memory, sequentially, with fsync), and a save in the
background with the steps that run beside it. `pause` is how long `save` and `poll` hold training up; `slowdown` is
what the writers and the pages that they make training copy cost the steps beside them. Prints a table, and as its
last line one JSON object with the same figures, medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_fipo import launch
from megatron_fipo.actor import FIPOActor
from megatron_fipo.batch import Rollouts, TrainBatch, plan_micro_batches
from megatron_fipo.checkpoint import Checkpointer
from megatron_fipo.config import CheckpointConfig, Config, load_config
from megatron_fipo.model.architecture import check_model
from megatron_fipo.parallel import topology as topologies

LAYOUTS = {"one": {}, "tp2": {"tensor": 2}, "pp2": {"pipeline": 2}, "dp2": {"world_size": 2}}
SIZES = {"tiny": (128, 4), "small": (512, 8), "large": (1024, 12)}  # hidden size, layers
VOCABULARY, SEQUENCES, PROMPT, RESPONSE = 4096, 24, 16, (64, 480)  # tokens
_BLOCK = 1 << 22  # bytes


def make_batch(actor: FIPOActor) -> TrainBatch:
    """This replica's share of random responses of unequal lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(*RESPONSE, (SEQUENCES,), generator=generator).tolist()

    def tokens(count: int) -> list[int]:
        return torch.randint(VOCABULARY, (count,), generator=generator).tolist()

    rollouts = Rollouts.from_responses(
        ids=range(SEQUENCES),
        prompts=[tokens(PROMPT) for _ in lengths],
        responses=[tokens(n) for n in lengths],
        log_probs=[[0.0] * n for n in lengths],
        truncated=[False] * SEQUENCES,
    ).replace(advantages=torch.randn(SEQUENCES, generator=generator))
    topology = actor.topology
    bins = plan_micro_batches(rollouts.lengths.tolist(), replicas=topology.dp.size(), token_budget=2048)
    batch = TrainBatch(tuple(actor.pack(rollouts, b) for b in bins[topology.dp.rank()]))
    return batch.with_token_values(old_log_probs=actor.log_probs(batch))


def timed(action: Callable[[], Any]) -> float:
    """Seconds until all ranks have done it."""
    dist.barrier()
    started = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - started


def write_raw(path: Path, size: int) -> None:
    """As many bytes as the rank's data file has, from memory."""
    block = os.urandom(_BLOCK)
    with open(path, "wb", buffering=0) as stream:
        for start in range(0, size, _BLOCK):
            stream.write(block[: size - start])
        os.fsync(stream.fileno())


def measure(config: Config, rounds: int, directory: str, out: str) -> None:
    """One rank's part; rank 0 leaves each round's figures in `out`."""
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
        Path(out).write_text(json.dumps(figures[1:]))  # the first round warms up


def make_checkpoint(directory: str, size: str) -> None:
    torch.manual_seed(0)
    hidden, layers = SIZES[size]
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=2,
            max_position_embeddings=1024,
        )
    ).save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="of the model")
    parser.add_argument("--layout", choices=LAYOUTS, default="one")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one to warm up")
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="on the disk that is to be measured")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory, prefix=".checkpoint-benchmark-") as directory:
        make_checkpoint(directory, args.size)
        layout = LAYOUTS[args.layout]
        ranks = max([1, *layout.values()])
        yaml = Path(directory, "config.yaml")
        yaml.write_text(
            f"model: {{hf_path: {directory}, dtype: bfloat16}}\n"
            f"parallel: {json.dumps({**layout, 'world_size': ranks})}\n"
            "data: {train: none, max_prompt_tokens: 16}\n"
            "rollout: {max_response_tokens: 480}\n"
            "reward: {overlong_buffer_tokens: 0}\n"
            "trainer: {tokens_per_micro_batch: 2048}\n"
        )
        config = load_config(yaml)
        launch.run(measure, config.parallel, (config, args.rounds, directory, f"{directory}/result.json"))
        report(args, json.loads(Path(directory, "result.json").read_text()))


def report(args: argparse.Namespace, rounds: list[dict[str, Any]]) -> None:
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
    table = Table("figure", "value", title="What a checkpoint costs training")
    for name, value in figures.items():
        table.add_row(name, str(value))
    Console(file=sys.stdout, width=80).print(table)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
