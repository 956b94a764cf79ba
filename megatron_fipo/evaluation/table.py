"""Terminal table of an evaluation."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_fipo.evaluation.summary import Evaluation

_WIDTH = 128


def show(result: Evaluation, name: str) -> None:
    """Print a row per benchmark, scores with 95% intervals. `name`: of a single benchmark."""
    k = result.samples
    scores = {"avg@k": f"avg@{k}", "cons@k": f"cons@{k}", "pass@k": f"pass@{k}"}
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    table.add_column("benchmark", overflow="fold", min_width=12)
    for column in ("problems", *scores.values(), "length", "correct", "incorrect", "truncated", "answered"):
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
            *("-" if share is None else f"{share:.1%}" for share in (e.truncated, e.answered)),
        )
    console = Console(width=_WIDTH, highlight=False, markup=False)
    console.print(table)
    further = {"cons_answered@k": result.cons_answered, **result.pass_at}
    shown = {name: value for name, value in further.items() if value is not None}
    if shown:
        names = {name: name.replace("@k", f"@{k}") for name in shown}
        console.print("  ".join(_with_interval(v, *result.intervals[s], names[s]) for s, v in shown.items()))
    console.print("in brackets: 95% intervals, bootstrap over problems; lengths in tokens")
    console.print("cons: no answer votes as one incorrect answer; cons_answered: among the responses with an answer")


def _with_interval(value: float, low: float, high: float, name: str = "") -> str:
    return f"{name} {value:.3f} [{low:.2f}, {high:.2f}]".strip()
