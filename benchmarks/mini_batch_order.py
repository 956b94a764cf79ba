"""What Future-KL sees with mixed mini-batches and with whole groups, on the quick start's first step.

    python benchmarks/mini_batch_order.py BASE_MODEL [--seeds 3] [--updates 4]

BASE_MODEL is the directory that `examples/quickstart/make_task.py --out` made. For each seed, one step of the quick
start is trained twice on one rank, from the same weights on the same responses, which is checked: once with
`trainer.mini_batch_order=groups`, once with `mixed`. All figures are read from the saved token credit, over the
response tokens of the whole step, each as its update saw it: mean Future-KL where the advantage is negative and where
it is positive, policy KL, mean influence weight.
Prints a table, and as its last line one JSON object with the same figures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

RECIPE = Path(__file__).parents[1] / "examples" / "quickstart.yaml"
ORDERS = ("groups", "mixed")
PROMPTS = 32  # of the recipe's step


def train(base: Path, out: Path, order: str, seed: int, updates: int) -> list[dict[str, Any]]:
    """Train one step; return its responses with their token credit, by id."""
    settings = [
        *(f"model.hf_path={base}", f"run.directory={out}", f"run.seed={seed}", f"trainer.mini_batch_order={order}"),
        *("parallel.world_size=1", "parallel.tensor=1", "parallel.pipeline=1", "trainer.max_steps=1"),
        *(f"trainer.mini_batch_prompts={PROMPTS // updates}", "data.validation=null", "trainer.export_policy=false"),
        *("checkpoint.every=0", "trainer.tensorboard=false"),
    ]
    command = [sys.executable, "-m", "megatron_fipo.cli", "train", str(RECIPE), *settings]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")
    return sorted(pq.read_table(out / "rollouts" / "step_1.parquet").to_pylist(), key=lambda row: int(row["id"]))


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the figures of one step over its tokens; policy KL in nats a token."""
    columns = ("old_log_probs", "new_log_probs", "future_kl", "influence_weights")
    old, new, future, weights = (np.concatenate([row[column] for row in rows]) for column in columns)
    advantages = np.concatenate([np.full(len(row["future_kl"]), row["advantage"]) for row in rows])
    negative = advantages < 0
    return {
        "future_kl_negative": float(future[negative].mean()),
        "future_kl_positive": float(future[advantages > 0].mean()),
        "policy_kl": float((old - new).mean()),
        "influence_weight": float(weights.mean()),
    }


def compare(base: Path, directory: Path, seed: int, updates: int) -> dict[str, dict[str, float]]:
    """Return the figures of both orders.

    Raises:
        RuntimeError: a run failed, or the two did not train on the same responses.
    """
    rows = {order: train(base, directory / f"{order}-{seed}", order, seed, updates) for order in ORDERS}
    groups, mixed = ([(r["id"], r["response_tokens"], r["advantage"]) for r in rows[order]] for order in ORDERS)
    if groups != mixed:
        raise RuntimeError(f"seed {seed}: the two orders trained on different responses")
    return {order: figures(of) for order, of in rows.items()}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="directory of the quick start's base model")
    parser.add_argument("--seeds", type=int, default=3, help="repeats, with seeds 1, 2, ...")
    parser.add_argument("--updates", type=int, default=4, help="updates of a full step; they divide its 32 prompts")
    args = parser.parse_args()
    if args.updates < 1 or PROMPTS % args.updates:
        parser.error(f"--updates {args.updates} must divide {PROMPTS}")
    with tempfile.TemporaryDirectory() as directory:
        found = {
            seed: compare(args.base.resolve(), Path(directory), seed, args.updates) for seed in range(1, args.seeds + 1)
        }
    names = list(next(iter(found.values()))["mixed"])
    table = Table("seed", "order", *names, title=f"quick start, first step; {args.updates} updates of a full step")
    for seed, orders in found.items():
        for order, values in orders.items():
            table.add_row(str(seed), order, *(f"{values[name]:.5f}" for name in names))
    Console(width=120).print(table)
    print(json.dumps({"updates": args.updates, "seeds": found}))


if __name__ == "__main__":
    main()
