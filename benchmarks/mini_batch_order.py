"""Future-KL with mixed mini-batches and with whole groups, on the quick start's first step.

    python benchmarks/mini_batch_order.py BASE_MODEL [--seeds 3] [--updates 4 8]

BASE_MODEL is the directory that `examples/quickstart/make_task.py --out` made. For each seed and number of updates, the
quick start's first step is trained twice on one rank, from the same weights on the same responses, which is checked:
once with `trainer.mini_batch_order=groups`, once with `mixed`. All figures are read from the saved token credit, over
the response tokens of the whole step, each as its update saw it: mean Future-KL where the advantage is negative and
where it is positive, policy KL (mean of old minus new log-probability), mean influence weight.
Prints a table, and as its last line one JSON object with the same figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from megatron_fipo import launch
from megatron_fipo.config import Config, load_config
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.trainer import Trainer

RECIPE = Path(__file__).parents[1] / "examples" / "quickstart.yaml"
ORDERS = ("groups", "mixed")
PROMPTS = 32  # of the recipe's step


def config_of(base: Path, out: Path, order: str, seed: int, updates: int) -> Config:
    """Return the quick start's config for one step on one rank, with `updates` updates of a full batch."""
    return load_config(
        RECIPE,
        [
            *(f"model.hf_path={base}", f"run.directory={out}", f"run.seed={seed}", f"trainer.mini_batch_order={order}"),
            *("parallel.world_size=1", "parallel.tensor=1", "parallel.pipeline=1", "trainer.max_steps=1"),
            *(f"trainer.mini_batch_prompts={PROMPTS // updates}", "data.validation=null", "checkpoint.every=0"),
            *("trainer.export_policy=false", "trainer.tensorboard=false"),
        ],
    )


def train(configs: Sequence[Config]) -> None:
    """Run in a rank: train one run after another."""
    for config in configs:
        trainer = Trainer(config)
        try:
            trainer.train()
        finally:
            trainer.close()
            topologies.destroy()


def rows_of(config: Config) -> list[dict[str, Any]]:
    """Return the responses of a run's first step with their token credit, by id."""
    table = pq.read_table(config.run_directory / "rollouts" / "step_1.parquet")
    return sorted(table.to_pylist(), key=lambda row: int(row["id"]))


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the figures of one step over its tokens, nats."""
    columns = ("old_log_probs", "new_log_probs", "future_kl", "influence_weights")
    old, new, future, weights = (np.concatenate([row[column] for row in rows]) for column in columns)
    advantages = np.concatenate([np.full(len(row["future_kl"]), row["advantage"]) for row in rows])
    return {
        "future_kl_negative": float(future[advantages < 0].mean()),
        "future_kl_positive": float(future[advantages > 0].mean()),
        "policy_kl": float((old - new).mean()),
        "influence_weight": float(weights.mean()),
    }


def compare(configs: dict[str, Config]) -> dict[str, dict[str, float]]:
    """Return the figures of both orders of one seed.

    Raises:
        RuntimeError: the two did not train on the same responses.
    """
    rows = {order: rows_of(config) for order, config in configs.items()}
    groups, mixed = ([(r["id"], r["response_tokens"], r["advantage"]) for r in rows[order]] for order in ORDERS)
    if groups != mixed:
        raise RuntimeError(f"the two orders trained on different responses, with run.seed={configs['mixed'].run.seed}")
    return {"responses": {"count": len(mixed)}, **{order: figures(of) for order, of in rows.items()}}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="directory of the quick start's base model")
    parser.add_argument("--seeds", type=int, default=3, help="repeats, with seeds 1, 2, ...")
    parser.add_argument("--updates", type=int, nargs="+", default=[4, 8], help="updates of a full step of 32 prompts")
    args = parser.parse_args()
    if any(updates < 1 or PROMPTS % updates for updates in args.updates):
        parser.error(f"--updates: each of {args.updates} must divide {PROMPTS}")
    base, cases = args.base.resolve(), [(n, seed) for n in args.updates for seed in range(1, args.seeds + 1)]
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        configs = {
            (n, seed): {order: config_of(base, out / f"{n}-{seed}-{order}", order, seed, n) for order in ORDERS}
            for n, seed in cases
        }
        every = [config for orders in configs.values() for config in orders.values()]
        launch.run(train, every[0].parallel, (every,))
        results = {case: compare(orders) for case, orders in configs.items()}
    report(results)


def report(results: dict[tuple[int, int], dict[str, dict[str, float]]]) -> None:
    """Print the results."""
    names = list(next(iter(results.values()))["mixed"])
    table = Table("updates", "seed", "responses", "order", *names, title="first step of the quick start")
    for (updates, seed), found in results.items():
        for order in ORDERS:
            cells = (f"{found[order][name]:.5f}" for name in names)
            table.add_row(str(updates), str(seed), str(found["responses"]["count"]), order, *cells)
    Console(width=120).print(table)
    print(json.dumps([{"updates": updates, "seed": seed, **found} for (updates, seed), found in results.items()]))


if __name__ == "__main__":
    main()
