"""Terminal table of an evaluation."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_fipo.evaluation.summary import Evaluation

_WIDTH = 118


def show(result: Evaluation, name: str) -> None:
    """Print a row per benchmark, scores with 95% intervals. `name`: of a single benchmark."""
    k = result.samples
    scores = {"avg@k": f"avg@{k}", "cons@k": f"cons@{k}", "pass@k": f"pass@{k}"}
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column("benchmark", overflow="fold", min_width=12)
    for column in ("problems", *scores.values(), "length", "correct", "incorrect", "truncated"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = {**result.benchmarks, "mean": result} if result.benchmarks else {name: result}
    for label, e in rows.items():
        figures = e.scores()
        table.add_row(
            label,
            str(e.problems),
            *(_with_interval(figures[s], *e.intervals[s]) for s in scores),
            f"{e.length:.0f}",
            *(f"{e.lengths[of]:.0f}" if of in e.lengths else "-" for of in ("correct", "incorrect")),
            f"{e.truncated:.1%}",
        )
    console = Console(width=_WIDTH, highlight=False, markup=False)
    console.print(table)
    if result.pass_at:
        console.print("  ".join(_with_interval(value, *result.intervals[s], s) for s, value in result.pass_at.items()))
    console.print("in brackets: 95% intervals, bootstrap over problems; lengths in tokens")


def _with_interval(value: float, low: float, high: float, name: str = "") -> str:
    return f"{name} {value:.3f} [{low:.2f}, {high:.2f}]".strip()
