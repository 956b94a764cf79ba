"""Figures of several runs: colours are runs, line styles are metrics; repeats are their mean with its t interval.

A mean is over all repeats or there is none: it ends where the shortest run ends, since the mean of those that are left
would jump where one with a low value has crashed.

T: steps of a series.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from megatron_fipo.comparison.statistics.paired import t_quantile
from megatron_fipo.report.history import History, Run, Values
from megatron_fipo.report.panels import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    RED,
    FigureSpec,
    Line,
    Lines,
    Panel,
    Reference,
    Scatter,
    Stack,
    compose,
    fitted_line,
    legend,
    line_values,
    smooth,
    style,
    to_png,
)
from megatron_fipo.report.parts import figure_text

_COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, "#1797a6", "#a5673f", "#d06fa8", GREY, "#111111", "#98992f", "#7fb7e6")
_STYLES = ("-", "--", ":", "-.", (0, (3, 1, 1, 1, 1, 1)))
_COLUMNS = 3  # columns of the legend
_NAME = 22  # maximum characters of a run's name in a figure
CONFIDENCE = 0.95
_LEAST = 1e-3  # of the mean: where an interval ends at the bottom of a log scale


@dataclass(frozen=True)
class Series:
    """Data of one colour. `low` and `high` are the interval of the mean of a group's runs, `history` their mean."""

    name: str
    color: str
    history: History
    runs: tuple[Run, ...]
    low: History | None = None
    high: History | None = None

    @property
    def label(self) -> str:
        """Name; of repeats with their number, and their last common step if one of them is longer."""
        if len(self.runs) == 1:
            return self.name
        ends = [run.rows[-1]["step"] for run in self.runs]
        return f"{self.name} (n = {len(ends)}{f' to step {min(ends):.0f}' if max(ends) > min(ends) else ''})"


def make_series(runs: Sequence[Run], names: Sequence[str], groups: Sequence[str] = ()) -> list[Series]:
    """Return one series per run or group of runs.

    A group is all NAME-seedN of one NAME, or all runs whose names begin with one of `groups`.
    """
    together: dict[str, list[Run]] = {}
    for run, name in zip(runs, names, strict=True):
        together.setdefault(_group(name, names, groups), []).append(run)
    return [_series(name, _COLORS[n % len(_COLORS)], members) for n, (name, members) in enumerate(together.items())]


def _group(name: str, names: Sequence[str], groups: Sequence[str]) -> str:
    given = next((group for group in groups if name.startswith(group)), None)
    if given is not None:
        return given
    stem = re.sub(r"-seed\d+$", "", name)
    repeats = sum(re.sub(r"-seed\d+$", "", other) == stem for other in names)
    return stem if stem != name and repeats > 1 else name


def _series(name: str, color: str, runs: Sequence[Run]) -> Series:
    histories = [History.from_rows(run.rows) for run in runs]
    if len(runs) == 1:
        return Series(name, color, histories[0], tuple(runs))
    steps = functools.reduce(np.intersect1d, [h.steps for h in histories])
    metrics = {metric for history in histories for metric in history.columns}
    bounds = {m: _mean_and_interval([_on(steps, h, m) for h in histories]) for m in metrics}
    mean, low, high = (History(steps, {m: values[part] for m, values in bounds.items()}) for part in range(3))
    return Series(name, color, mean, tuple(runs), low, high)


def _on(steps: Values, history: History, metric: str) -> Values:
    """Return a run's values [T] at some of its steps."""
    return history[metric][np.searchsorted(history.steps, steps)]


def _mean_and_interval(values: Sequence[Values]) -> tuple[Values, Values, Values]:
    """Return the mean over the runs and the ends of its t interval; NaN where a run has no finite value."""
    stacked = np.stack(values)
    stacked = np.where(np.isfinite(stacked).all(0), stacked, np.nan)
    mean, n = stacked.mean(0), len(stacked)
    half = t_quantile(n - 1, 0.5 + CONFIDENCE / 2) * stacked.std(0, ddof=1) / np.sqrt(n)
    return mean, mean - half, mean + half


def draw_together(spec: FigureSpec, series: Sequence[Series], references: Sequence[Reference] = ()) -> bytes | None:
    """Plot several runs; return PNG, or None if none of them has data."""
    figure = compose(
        spec,
        lambda panel: any(panel.has_data(s.history) for s in series),
        lambda panel, axes: _draw_panel(panel, axes, series),
        references,
    )
    if figure is None:
        return None
    _make_room(figure, -(-len(series) // _COLUMNS))
    handles = [Line2D([], [], color=s.color, linewidth=2.5, label=figure_text(_short(s.label))) for s in series]
    figure.legend(
        handles=handles,
        loc="upper right",
        bbox_to_anchor=(0.985, 0.99),
        ncols=min(_COLUMNS, len(handles)),
        frameon=False,
        fontsize=7.5,
        labelcolor=INK,
        handlelength=1.0,
        columnspacing=1.0,
        borderaxespad=0.0,
    )
    return to_png(figure)


def _make_room(figure: Figure, rows: int) -> None:
    """Enlarge the figure for a legend of more than two rows; panels keep their size."""
    height = figure.get_figheight()
    taller = height + 0.17 * max(0, rows - 2)
    figure.set_figheight(taller)
    top, bottom = (edge * height / taller for edge in (figure.subplotpars.top, figure.subplotpars.bottom))
    figure.subplots_adjust(top=top, bottom=bottom)


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"


def _draw_panel(panel: Panel, axes: Axes, series: Sequence[Series]) -> None:
    if isinstance(panel, Scatter):
        for one in series:
            _draw_dots(panel, axes, one)
        style(axes, panel.unit, log=False)
        axes.set_xlabel(panel.x_label)
        return
    assert isinstance(panel, Lines | Stack)
    lines = panel.lines if isinstance(panel, Lines) else (Line(panel.total, "all"), *panel.parts)
    lines = tuple(line for line in lines if any(np.isfinite(line_values(line, s.history)).any() for s in series))
    wants_log = isinstance(panel, Lines) and panel.log
    log = wants_log and any((line_values(line, s.history) > 0).any() for line in lines for s in series)
    for one in series:
        for line, dashes in zip(lines, _STYLES, strict=False):
            _draw_line(axes, line, one, dashes, log)
    style(axes, panel.unit, log)
    legend(axes, needed=len(lines) > 1)


def _draw_line(axes: Axes, line: Line, series: Series, dashes: object, log: bool) -> None:
    values = line_values(line, series.history)
    shown = np.isfinite(values) & ((values > 0) | (not log))
    if not shown.any():
        return
    steps, values = series.history.steps[shown], values[shown]
    if series.low is not None and series.high is not None:
        low, high = series.low[line.metric][shown], series.high[line.metric][shown]
        if log:
            low = np.maximum(low, values * _LEAST)  # an interval of a positive quantity may reach below 0
        outline = np.concatenate([np.column_stack([steps, low]), np.column_stack([steps, high])[::-1]])
        # Axes are of the means: the interval of two runs reaches 13 times as far from their mean as they do.
        band = PolyCollection([outline], facecolor=series.color, alpha=0.15, linewidth=0)
        axes.add_collection(band, autolim=False)
    marker = "o" if len(values) == 1 else ""
    axes.plot(steps, smooth(values), color=series.color, linewidth=1.4, linestyle=dashes, marker=marker, markersize=3)
    if not any(handle.get_label() == line.label for handle in axes.get_lines()) and line.label:
        axes.plot([], [], color=INK, linewidth=1.2, linestyle=dashes, label=line.label)


def _draw_dots(panel: Scatter, axes: Axes, series: Series) -> None:
    x, y = series.history[panel.x], series.history[panel.y]
    axes.scatter(x, y, color=series.color, s=20 if len(x) <= 300 else 6, linewidths=0, alpha=0.6)
    line = fitted_line(x, y)
    if line is not None:
        axes.plot(line.x, line.y, color=series.color, linewidth=1.2)
