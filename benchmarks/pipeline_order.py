"""Simulated update time for each order of micro-batches, relative to the longest first.

For every pipeline, responses of three length distributions are distributed to replicas and micro-batches by the
trainer's packer; a step is that of the slowest replica. `worst` is the least favourable mini-batch of
"longest_middle", `search` the step found by random swaps from it, relative to it. Shapes are known to all stages, as in
training; `shapes_sent` is "longest_first" with a free shape message before every message, as Megatron-Core's own
communicator sends them, relative to "longest_first" without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys

from rich.console import Console
from rich.table import Table

from megatron_fipo.scaling.pipeline.micro_batch_orders import (
    LENGTHS,
    ORDERS,
    Setting,
    compare_orders,
    micro_batch_seconds,
    search_order,
    step_seconds,
)
from megatron_fipo.scaling.pipeline.simulate import Communication

PIPELINES = [(2, 1), (4, 1), (8, 1), (16, 1), (2, 2), (4, 2), (8, 2), (4, 4)]  # stages, chunks
BASE = ORDERS["longest_first"]
SEARCHED = 32  # maximum micro-batches for searching an order


def settings(stages: int, chunks: int) -> list[Setting]:
    """Return the settings of a pipeline."""
    return [
        Setting(stages, chunks, replicas=replicas, sequences=sequences, lengths=lengths)
        for lengths in LENGTHS
        for replicas in (1, 8)
        for sequences in (16, 64)
    ]


def measure(stages: int, chunks: int, seeds: range) -> dict[str, float]:
    """Return geometric means over settings and seeds, and the worst."""
    ratios: dict[str, list[float]] = {name: [] for name in (*ORDERS, "search", "shapes_sent")}
    for setting in settings(stages, chunks):
        for name, values in compare_orders(setting, seeds).items():
            ratios[name] += values
        replicas = micro_batch_seconds(setting, seeds[0])
        base = step_seconds(setting, replicas, BASE)
        sent = Communication(shape_seconds=0.0)
        ratios["shapes_sent"].append(step_seconds(setting, replicas, BASE, sent) / base)
        if setting.replicas == 1 and len(replicas[0]) <= SEARCHED:
            middle = step_seconds(setting, replicas, ORDERS["longest_middle"])
            found = search_order(setting, replicas[0], ORDERS["longest_middle"], tries=100)
            ratios["search"].append(found / middle)
    figures = {name: statistics.geometric_mean(values) for name, values in ratios.items() if name != "longest_first"}
    return {**figures, "worst": max(ratios["longest_middle"])}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="sampled mini-batches per setting")
    seeds = range(parser.parse_args().seeds)
    results = {f"pp{p}" + (f"_vpp{v}" if v > 1 else ""): measure(p, v, seeds) for p, v in PIPELINES}
    columns = list(next(iter(results.values())))
    table = Table("pipeline", *columns, title="step over that of longest_first")
    for name, figures in results.items():
        table.add_row(name, *(f"{figures[c]:.3f}" for c in columns))
    Console(file=sys.stdout, width=150).print(table)
    rounded = {name: {c: round(x, 4) for c, x in figures.items()} for name, figures in results.items()}
    print(json.dumps({"seeds": len(seeds), "ratio_to_longest_first": rounded}))


if __name__ == "__main__":
    main()
