"""Panels of figures: lines with bands, scatter plots, stacked areas.

A panel knows whether a run has data for it (`has_data`) and draws itself on an axes (`draw`). Figures use
matplotlib `Figure` objects without pyplot, so that no global state changes. T: rows, one per step.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from megatron_fipo.report.history import History, Values

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#2f6db3", "#dd7a1f", "#2e8b62", "#c2414b", "#7a62b3", "#7b8288"
PALE, MIDDLE, DEEP = "#93b8e0", "#2f6db3", "#133c6e"  # one quantity and its quantiles
INK, GRID = "#30353a", "#e4e7ea"

_INCHES, _DPI = (6.4, 4.1), 150  # equal for all figures: two fit side by side on a screen
_MARKED = 60  # points up to which markers are drawn
_SMOOTHED = 300  # points from which a running mean is drawn over pale values
_ROUND = [1, 2, 2.5, 5, 10]  # tick distances
_SIGNIFICANT = 1e-12  # relative rounding error when phases are subtracted from their total


class Panel(Protocol):
    def has_data(self, history: History) -> bool: ...

    def draw(self, axes: Axes, history: History) -> None: ...


@dataclass(frozen=True)
class Line:
    metric: str
    label: str = ""
    color: str = BLUE
    zero_is_no_data: bool = False  # metrics over an empty set are logged as 0
    before_after: bool = False  # label the first and the last value


@dataclass(frozen=True)
class Band:
    """Area between two metrics."""

    low: str
    high: str
    label: str
    color: str
    alpha: float = 0.18


@dataclass(frozen=True)
class Lines:
    """Metrics over steps, with `unit` as the panel's title. A log scale becomes linear if no value is positive."""

    unit: str
    lines: tuple[Line, ...]
    bands: tuple[Band, ...] = ()
    log: bool = False

    def has_data(self, history: History) -> bool:
        return any(np.isfinite(line_values(line, history)).any() for line in self.lines)

    def draw(self, axes: Axes, history: History) -> None:
        drawn = [line for line in self.lines if np.isfinite(line_values(line, history)).any()]
        log = self.log and any((line_values(line, history) > 0).any() for line in drawn)
        for band in self.bands:
            _draw_band(axes, band, history, log)
        for line in drawn:
            _draw_line(axes, line, history, log)
        style(axes, self.unit, log)
        if not any(np.nan_to_num(history[line.metric]).any() for line in drawn):
            axes.set_yticks([0])  # an automatic scale around 0 would show negative counts
        _widen(axes, history)
        legend(axes, needed=len(drawn) + len(self.bands) > 1 or any(line.before_after for line in drawn))


@dataclass(frozen=True)
class Scatter:
    """One metric against another, one dot per step, coloured by step."""

    x: str
    x_label: str
    y: str
    unit: str

    def has_data(self, history: History) -> bool:
        return bool((np.isfinite(history[self.x]) & np.isfinite(history[self.y])).any())

    def draw(self, axes: Axes, history: History) -> None:
        size = 26 if len(history.steps) <= _SMOOTHED else 7
        dots = axes.scatter(
            history[self.x], history[self.y], c=history.steps, s=size, cmap="viridis_r", linewidths=0, alpha=0.85
        )
        line = fitted_line(history[self.x], history[self.y])
        if line is not None:
            axes.plot(line.x, line.y, color=INK, linewidth=1.1, label=f"least squares, r = {line.r:.2f}")
        style(axes, self.unit, log=False)
        legend(axes, needed=True)
        axes.set_xlabel(self.x_label)
        figure = axes.get_figure()
        assert figure is not None
        figure.subplots_adjust(right=0.94)  # space for the numbers beside the colour bar
        bar = figure.colorbar(dots, ax=axes, fraction=0.04, pad=0.015)
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=8, labelcolor=INK)
        bar.ax.yaxis.set_major_locator(MaxNLocator(5, steps=_ROUND, integer=True, min_n_ticks=1))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(_number))
        bar.ax.set_title("step", fontsize=8, color=INK)


@dataclass(frozen=True)
class Stack:
    """Stacked areas; what `total` exceeds the sum of `parts` is drawn as the rest. `extra` is not part of the total."""

    unit: str
    total: str
    parts: tuple[Line, ...]
    extra: tuple[Line, ...] = ()

    def has_data(self, history: History) -> bool:
        return bool(np.isfinite(history[self.total]).any())

    def draw(self, axes: Axes, history: History) -> None:
        rows = np.isfinite(history[self.total])
        steps, total = history.steps[rows], history[self.total][rows]
        parts = [np.nan_to_num(history[part.metric][rows]) for part in self.parts]
        rest = np.maximum(total - np.sum(parts, axis=0), 0.0)
        layers = [(p.label, p.color, v) for p, v in zip(self.parts, parts, strict=True)]
        layers.append(("rest", GREY, np.where(rest > _SIGNIFICANT * total, rest, 0.0)))
        layers += [(e.label, e.color, np.nan_to_num(history[e.metric][rows])) for e in self.extra]
        below = np.zeros(len(steps))
        for label, color, values in layers:
            if values.any():
                below = _draw_layer(axes, steps, below, values, label, color)
        style(axes, self.unit, log=False)
        axes.set_ylim(bottom=0)
        _widen(axes, history)
        legend(axes, needed=True)


@dataclass(frozen=True)
class FigureSpec:
    """Figure specification. `name`: file name; `caption`: how to read it; `panels`: top to bottom, shared steps."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]


class Reference(NamedTuple):
    """Published value of `metric`, drawn in every panel that shows the metric."""

    metric: str
    label: str
    level: float


def draw(spec: FigureSpec, history: History, references: Sequence[Reference] = ()) -> bytes | None:
    """Plot a figure; return PNG, or None if the run has no data."""
    figure = compose(
        spec, lambda panel: panel.has_data(history), lambda panel, axes: panel.draw(axes, history), references
    )
    return to_png(figure) if figure is not None else None


def compose(
    spec: FigureSpec,
    has_data: Callable[[Panel], bool],
    draw_panel: Callable[[Panel, Axes], None],
    references: Sequence[Reference],
) -> Figure | None:
    """Return the panels with data, drawn with their references; None if there are none."""
    panels = [panel for panel in spec.panels if has_data(panel)]
    if not panels:
        return None
    figure, all_axes = empty_figure(spec.title, len(panels))
    for panel, axes in zip(panels, all_axes, strict=True):
        draw_panel(panel, axes)
        draw_references(panel, axes, references)
    if not all_axes[-1].get_xlabel():
        all_axes[-1].set_xlabel("step", fontsize=9, color=INK)
    return figure


def draw_references(panel: Panel, axes: Axes, references: Sequence[Reference]) -> None:
    """Draw reference lines; equal values share a line and a label."""
    shown = {line.metric for line in panel.lines} if isinstance(panel, Lines) else set()
    levels: dict[float, list[str]] = {}
    for reference in references:
        if reference.metric in shown:
            levels.setdefault(reference.level, []).append(reference.label)
    for level, labels in levels.items():
        axes.axhline(level, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{', '.join(labels)} {level:g}",
            (0.995, level),
            xycoords=("axes fraction", "data"),
            xytext=(0, 1.5),
            textcoords="offset points",
            ha="right",
            fontsize=6.5,
            color=GREY,
        )


def empty_figure(title: str, panels: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with its title and `panels` axes from top to bottom, with a shared x axis."""
    # rcParams stay unchanged: the caller's own plots must not be affected.
    figure = Figure(figsize=_INCHES, dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.1, right=0.97, top=0.85, bottom=0.115, hspace=0.4 if panels == 2 else 0.62)
    figure.suptitle(title, x=0.02, y=0.975, ha="left", va="top", fontsize=11.5, fontweight="bold", color=INK)
    return figure, list(all_axes)


def to_png(figure: Figure) -> bytes:
    """Return the figure as PNG."""
    png = io.BytesIO()
    figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def style(axes: Axes, unit: str, log: bool) -> None:
    """Apply the common style: unit on top, thin grid, no frame."""
    axes.set_title(unit, loc="left", fontsize=9, color=INK, pad=5)
    axes.set_axisbelow(True)
    axes.grid(True, color=GRID, linewidth=0.7)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#a9afb5")
    axes.tick_params(which="both", length=0, labelsize=8, labelcolor=INK)
    axes.xaxis.label.set(fontsize=9, color=INK)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=_ROUND, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(_number))
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(4 if axes.get_position().height < 0.4 else 6, steps=_ROUND))
    axes.yaxis.set_major_formatter(FuncFormatter(_number))


def running_mean(values: Values, window: int) -> Values:
    """Return the centred mean over `window` values (fewer at the ends): [n] -> [n]."""
    ones = np.ones(window)
    means = np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
    return np.clip(means, values.min(), values.max())  # rounding could make a constant look like two values


class FittedLine(NamedTuple):
    """Linear fit. `x`, `y`: its end points; `r`: correlation."""

    x: tuple[float, float]
    y: tuple[float, float]
    r: float


def fitted_line(x: Values, y: Values) -> FittedLine | None:
    """Fit a line by least squares to the finite points; None for fewer than three, or without variance in x or y."""
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    if len(x) < 3:
        return None
    with np.errstate(all="ignore"):
        dx, dy = x - x.mean(), y - y.mean()
        xx, yy, xy = (dx * dx).sum(), (dy * dy).sum(), (dx * dy).sum()
        slope, r = xy / xx, xy / np.sqrt(xx * yy)
        ends = float(x.min()), float(x.max())
        heights = tuple(float(y.mean() + slope * (end - x.mean())) for end in ends)
    if not np.isfinite([r, *heights]).all():
        return None
    return FittedLine(ends, (heights[0], heights[1]), float(r))


def smooth(values: Values) -> Values:
    """Return the values to draw: unchanged, or for a long line the running mean."""
    return running_mean(values, _window(len(values))) if len(values) > _SMOOTHED else values


def _window(count: int) -> int:
    """Return an odd window of about 1% of the points."""
    return count // 200 * 2 + 1


def line_values(line: Line, history: History) -> Values:
    """Return the line's values [T]."""
    values = history[line.metric]
    return np.where(values == 0, np.nan, values) if line.zero_is_no_data else values


def _draw_line(axes: Axes, line: Line, history: History, log: bool) -> None:
    values = line_values(line, history)
    shown = np.isfinite(values) & ((values > 0) | (not log))
    steps, values = history.steps[shown], values[shown]
    if not len(values):
        return
    label = line.label
    if line.before_after:
        label += f" {values[0]:.3f}" + (f" → {values[-1]:.3f}" if len(values) > 1 else "")
        axes.axhline(float(values[0]), color=line.color, linewidth=0.8, linestyle=(0, (2, 3)))
    if len(values) > _SMOOTHED:
        axes.plot(steps, values, color=line.color, linewidth=0.6, alpha=0.25)
        values = running_mean(values, _window(len(values)))
    marker = "o" if len(values) <= _MARKED else ""
    axes.plot(steps, values, color=line.color, label=label, linewidth=1.5, marker=marker, markersize=3)


def _draw_band(axes: Axes, band: Band, history: History, log: bool) -> None:
    low, high = history[band.low], history[band.high]
    shown = np.isfinite(low) & np.isfinite(high) & ((low > 0) | (not log))
    if shown.any():
        axes.fill_between(
            history.steps, low, high, where=shown, color=band.color, alpha=band.alpha, linewidth=0, label=band.label
        )


def _draw_layer(axes: Axes, steps: Values, below: Values, values: Values, label: str, color: str) -> Values:
    """Draw one layer of a stack; return its upper edge before smoothing."""
    above = below + values
    if len(steps) <= _MARKED:
        axes.bar(steps, values, bottom=below, width=0.8, color=color, label=label)
        return above
    window = _window(len(steps)) if len(steps) > _SMOOTHED else 1
    edges = running_mean(below, window), running_mean(above, window)
    axes.fill_between(steps, *edges, color=color, linewidth=0, label=label, step="mid" if window == 1 else None)
    return above


def legend(axes: Axes, needed: bool) -> None:
    """Draw the legend above the panel at its right, where it covers no data."""
    handles, _ = axes.get_legend_handles_labels()
    if needed and handles:
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1.0, 1.0),
            ncols=len(handles),
            frameon=False,
            fontsize=8,
            labelcolor=INK,
            handlelength=1.1,
            handletextpad=0.4,
            columnspacing=1.1,
            borderaxespad=0.1,
        )


def _widen(axes: Axes, history: History) -> None:
    """Widen the x axis of a one-step run to half a step on both sides."""
    if len(history.steps) == 1:
        axes.set_xlim(history.steps[0] - 0.5, history.steps[0] + 0.5)


def _number(value: float, _position: int | None = None) -> str:
    return f"{value:,.6g}".replace("e-0", "e-").replace("e+0", "e")
