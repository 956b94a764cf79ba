"""Generation for one training batch after another: what is thrown away, and what that costs.

    python benchmarks/generation.py [--batches 3] [--parts simulation servers vllm] [--fill]

simulation: 32 servers that run 256 responses each, 8 replicas, 512 informative groups of 16, at most 2,048 groups in
flight. Response lengths are lognormal, with a mean of 4k and 9k, cut at 20,480 tokens. A server takes 20 ms for a token
of each of its responses, and twice as long when it is full. Long problems are less likely to be informative. The
package's plan decides (`batching/plan.py`); servers, clients and time are simulated.
servers: the package's batch builder, group source and vLLM client against two servers in this process, that run 8
responses each and take 6 ms for a token of each. Its times are only of use on a machine that does nothing else.
vllm: training steps of the quick start on a real vLLM server (`make vllm-env`), with windows of 64 and 128 groups.

`before` is the policy of earlier releases: the same number of groups is always in flight, nothing is cancelled until
the batch is full, and every replica may fill every server. The batches of both must be equal, or the command fails.
cancelled: share of all generated tokens that belong to no group before the end of the batch. The first batch of a run
has no estimate from an earlier one, and is shown separately. `--fill` begins further groups whenever places are free.
Prints tables, and as its last line one JSON object with the same results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from rich.table import Table

from generation_servers import generate_batches
from generation_simulation import simulate

ROWS = [(length, share) for length in (4000, 9000) for share in (0.3, 0.5, 0.7)]
PARTS = ("simulation", "servers", "vllm")
POLICIES = ("before", "after")
CONSOLE = Console(stderr=True)


def compare(title: str, rows: Sequence[tuple[str, Any]], run: Callable[[str, Any], list[dict[str, Any]]]) -> list[Any]:
    """Run both policies, check that their batches are equal, and print a table."""
    columns = ("before", "first batch", "after", "first batch", "tokens", "time", "slowest batch")
    table = Table("setting", *columns, title=title)
    results = []
    for name, setting in track(rows, title, console=CONSOLE):
        before, after = (run(policy, setting) for policy in POLICIES)
        for old, new in zip(before, after, strict=True):
            if any(old[key] != new[key] for key in {"end", "ids", "tokens"} & old.keys()):
                raise RuntimeError(f"{name}: the policies sampled different batches")
        runs = dict(zip(POLICIES, (before, after), strict=True))
        figures = {
            **{f"cancelled_{p}": mean(batch["cancelled"] for batch in run[1:]) for p, run in runs.items()},
            **{f"cancelled_{p}_first": run[0]["cancelled"] for p, run in runs.items()},
            **{key: _total(after, key) / _total(before, key) - 1 for key in ("generated", "seconds")},
            "slowest_batch": max(n["seconds"] / o["seconds"] for o, n in zip(before, after, strict=True)) - 1,
        }
        results.append({"setting": name, **{k: round(v, 3) for k, v in figures.items()}})
        shares = [f"{figures[f'cancelled_{p}{first}']:.0%}" for p in POLICIES for first in ("", "_first")]
        table.add_row(name, *shares, *(f"{figures[k]:+.0%}" for k in ("generated", "seconds", "slowest_batch")))
    Console(file=sys.stdout, width=120).print(table)
    return results


def _total(run: Sequence[dict[str, Any]], key: str) -> float:
    """Return a sum over all batches but the first."""
    return sum(batch[key] for batch in run[1:])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=3, help="measured batches, after a first one")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:2])
    parser.add_argument("--fill", action="store_true", help="begin further groups whenever places are free")
    options = parser.parse_args()
    if options.batches < 1:
        parser.error("--batches must be at least 1")
    figures: dict[str, Any] = {"machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} core(s)"}
    if "simulation" in options.parts:
        rows = [(f"{length // 1000}k, {share:.0%} informative", (length, share)) for length, share in ROWS]
        figures["simulation"] = compare(
            "32 servers, simulated", rows, lambda policy, s: simulate(policy, *s, options.batches, options.fill)
        )
    if "servers" in options.parts:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        rows = [(f"{share:.0%} informative", share) for share in (0.3, 0.5, 0.7)]
        figures["servers"] = compare(
            "2 servers, real client", rows, lambda policy, s: generate_batches(policy, s, options.batches)
        )
        dist.destroy_process_group()
    if "vllm" in options.parts:
        from generation_vllm import quickstart_base, train_batches

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        rows = [(f"window {window}", window) for window in (64, 128)]
        with quickstart_base() as base:
            figures["vllm"] = compare(
                "quick start, vLLM", rows, lambda policy, window: train_batches(base, policy, window, options.batches)
            )
        dist.destroy_process_group()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
