"""Replay of published pipeline stage times: simulated step and bubble relative to measured ones.

The profiles (data/pipeline_profiles.csv, each row with its source) are of two kinds:
- Times of every stage, with the step measured in the same run (Vocabulary Parallelism, 8 A100s). `baseline` and `redis`
  are Megatron's 1F1B, with the output layer on the last stage, and with layers moved away from it. The other kinds add
  passes of a split vocabulary, which are counted here as part of forward and backward. Transfers are not published
  and assumed free.
- One time for all stages, with transfers, profiled under a different schedule than the measured step
  (Zero Bubble, 8 A100s). The step need not agree. The bubble is the source's own calculation from the profile.
"""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_fipo.scaling.pipeline.simulate import Communication, simulate
from megatron_fipo.shapes.schedule import Schedule

DATA = Path(__file__).parent / "data" / "pipeline_profiles.csv"
MEGATRON = ("baseline", "redis")  # profiled and measured under Megatron's schedule


@dataclass(frozen=True)
class Replay:
    """One measured configuration. Errors: simulated over measured step, minus 1; and of the bubble fraction."""

    name: str
    kind: str
    step: float
    bubble: float
    step_error: float
    bubble_error: float


def replays() -> list[Replay]:
    """Return the replays of all profiles."""
    with DATA.open() as file:
        rows = list(csv.DictReader(file))
    shared = ("source", "model", "sequence", "kind", "stages", "chunks", "micro_batches", "step_s")
    return [_replay(list(group)) for _, group in groupby(rows, key=lambda row: [row[name] for name in shared])]


def _replay(rows: list[dict[str, str]]) -> Replay:
    """Replay the rows of a configuration's stages, or the one row that represents all of them."""
    row = rows[0]
    schedule = Schedule(int(row["stages"]), int(row["micro_batches"]), int(row["chunks"]))
    assert [r["stage"] for r in rows] in ([str(i) for i in range(schedule.stages)], ["all"])
    forward, backward = (
        [[float(r[name]) / 1e3 / schedule.chunks] for r in rows] for name in ("forward_ms", "backward_ms")
    )
    transfer = Communication(float(row["transfer_ms"]) / 1e3)
    timeline = simulate(schedule, forward, backward, transfer)
    step, bubble = float(row["step_s"]), float(row["bubble_fraction"])
    layout = f"pp {schedule.stages}, vpp {schedule.chunks}, m {schedule.micro_batches}"
    name = f"{row['model']}, sequence {row['sequence']}, {layout}"
    return Replay(name, row["kind"], step, bubble, timeline.step / step - 1, timeline.bubble_fraction - bubble)


def main() -> None:
    """Print the table."""
    table = Table("configuration", "kind", "step, s", "error of step", "bubble", "error of bubble")
    results = replays()
    for r in results:
        errors = f"{r.step_error:+.2%}", f"{r.bubble:.4f}", f"{r.bubble_error:+.4f}"
        table.add_row(r.name, r.kind, f"{r.step:.4f}", *errors)
    Console(file=sys.stdout, width=130).print(table)
    megatron = [r for r in results if r.kind in MEGATRON]
    zero_bubble = [r for r in results if r.kind in ("1F1B", "interleaved")]
    figures = {
        "megatron_rows": len(megatron),
        "worst_step_error": round(max(abs(r.step_error) for r in megatron), 4),
        "other_rows": len(results) - len(megatron) - len(zero_bubble),
        "worst_step_error_other": round(max(abs(r.step_error) for r in results if r not in megatron + zero_bubble), 4),
        "zero_bubble_rows": len(zero_bubble),
        "worst_bubble_error_zero_bubble": round(max(abs(r.bubble_error) for r in zero_bubble), 4),
        "worst_step_error_zero_bubble": round(max(abs(r.step_error) for r in zero_bubble), 4),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
