"""Scores of runs: before and after for one, a line each for several, with mean and deviation over repeats."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

from megatron_fipo.report.compare import Series
from megatron_fipo.report.history import Run

Table = tuple[list[str], list[list[str]]]  # column names and rows


class _Metric(NamedTuple):
    name: str
    label: str  # {k}: samples per problem
    format: str
    short: str = ""  # column title; "": the label
    evaluation: bool = True
    compared: bool = True  # a column of the comparison


_METRICS = (
    _Metric("eval/avg@k", "avg@{k}", ".3f"),
    _Metric("eval/cons@k", "cons@{k}", ".3f"),
    _Metric("eval/cons_answered@k", "cons_answered@{k}", ".3f", compared=False),
    _Metric("eval/answered", "responses with an answer", ".3f", compared=False),
    _Metric("eval/pass@k", "pass@{k}", ".3f"),
    _Metric("eval/length", "mean response length", ".0f", "length"),
    _Metric("batch/reward", "training reward", ".3f", "reward", evaluation=False),
    _Metric("batch/response_length/mean", "training response length", ".0f", "length", evaluation=False),
    _Metric("generated/accuracy", "generated accuracy", ".3f", "accuracy", evaluation=False),
)


def before_after(run: Run) -> Table:
    """Return the evaluation before and after training, and training metrics of the first and last step."""
    lines = []
    for metric in _METRICS:
        before, after = _value(run, metric, last=False), _value(run, metric, last=True)
        change = None if before is None or after is None else after - before
        if before is not None or after is not None:
            cells = [_cell(before, metric.format), _cell(after, metric.format), _cell(change, "+" + metric.format)]
            lines.append([metric.label.format(k=_samples([run])), *cells])
    return ["", "before", "after", "change"], lines


def comparison(series: Sequence[Series]) -> Table:
    """Return one line per series; for repeats the mean and the sample standard deviation.

    Shows evaluation scores, or training metrics if no run was evaluated. Steps: of the shortest run, and repeats are
    compared at their last common step: of one that has crashed, a longer one's later score would be no repeat.
    """
    runs = [run for one in series for run in one.runs]
    known = [m for m in _METRICS if m.compared and any(_value(run, m, last=True) is not None for run in runs)]
    shown = [m for m in known if m.evaluation] or known
    first = shown[:1]
    labels = [(m.short or m.label).format(k=_samples(runs)) for m in shown]
    head = ["run", "runs", "steps", *(f"{labels[0]} before" for _ in first), *labels]
    lines = [
        [
            one.name,
            str(len(one.runs)),
            _steps(one),
            *(_spread([_value(run, m, last=False) for run in one.runs], m.format) for m in first),
            *(_spread(_last_values(one.runs, m), m.format) for m in shown),
        ]
        for one in series
    ]
    return head, lines


def _last_values(runs: Sequence[Run], metric: _Metric) -> list[float | None]:
    """Return each run's value at the last step at which all have it, or nothing if there is none."""
    if len(runs) == 1:
        return [_value(runs[0], metric, last=True)]
    rows = [{row["step"]: row for row in run.trained if metric.name in row} for run in runs]
    ends = {max(of, default=0.0) for of in rows}
    common = set.intersection(*(set(of) for of in rows))
    if len(ends) == 1 or not common:  # a finished run without rows of evaluations has them in its summary
        return [_value(run, metric, last=True) for run in runs] if len(ends) == 1 else []
    return [of[max(common)][metric.name] for of in rows]


def _steps(series: Series) -> str:
    run = min(series.runs, key=lambda run: run.trained[-1]["step"])
    steps, total = int(run.trained[-1]["step"]), run.count("trainer.max_steps")
    return f"{steps:,} of {total:,}" if total and not run.summary else f"{steps:,}"


def _value(run: Run, metric: _Metric, last: bool) -> float | None:
    if metric.evaluation:
        return (run.after if last else run.before).get(metric.name)
    return run.trained[-1 if last else 0].get(metric.name)


def _samples(runs: Sequence[Run]) -> str:
    """Return the samples per problem if all runs use the same number."""
    found = {run.count("eval.samples") for run in runs}
    return str(found.pop() or "k") if len(found) == 1 else "k"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _spread(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{mean(known):{form}}" + (f" ±{stdev(known):{form}}" if len(known) > 1 else "")
