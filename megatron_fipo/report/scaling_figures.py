"""Figures of a scaling study: scaling of layouts, causes of the bubble, and accuracy of the planner.

Each function takes rows and returns a PNG, or None if they have no data for it. R: plotted rows.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from megatron_fipo.report import scaling_findings as findings
from megatron_fipo.report.panels import BLUE, GREEN, GREY, GRID, INK, ORANGE, PURPLE, RED, style
from megatron_fipo.report.parts import figure_text
from megatron_fipo.scaling.cost.hardware import find_hardware
from megatron_fipo.scaling.measure.row_reader import CAUSES, MeasuredRow
from megatron_fipo.scaling.pipeline.timeline import Bubble

_WIDTH, _DPI = 6.4, 150  # like the figures of a training run
_SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
_CAUSE_COLORS = dict(zip(CAUSES, (BLUE, GREY, GREEN, ORANGE), strict=True))
_BARS = 24  # maximum layouts in a bar chart
_CAUSE_PANELS = 4
_GIGA = 1e9
_LEGEND: dict[str, Any] = {
    "frameon": False,
    "fontsize": 8,
    "labelcolor": INK,
    "handlelength": 1.1,
    "handletextpad": 0.4,
}

Rows = Sequence[MeasuredRow]
assert tuple(f.name for f in fields(Bubble)) == CAUSES


@dataclass(frozen=True)
class ScalingFigure:
    """Figure specification. `name`: file name; `caption`: how to read it; `draw`: returns None without data."""

    name: str
    title: str
    caption: str
    draw: Callable[[Rows], bytes | None]


def draw_scaling(rows: Rows) -> bytes | None:
    """Plot seconds, tokens/s/GPU and efficiency over GPUs: a line of the best layouts, dots for the others."""
    best = findings.best_layouts(rows)
    if len({b.row.layout.gpus for b in best}) < 2:
        return None
    figure, panels = _figure("Scaling", 3, 6.6)
    label = _setting_labels(rows)
    for color, (setting, own) in zip(_colors(), groupby(best, key=lambda b: b.row.setting), strict=False):
        line = list(own)
        gpus = [b.row.layout.gpus for b in line]
        values: tuple[list[float | None], ...] = (
            [b.row.seconds for b in line],
            [b.row.tokens_per_second_per_gpu for b in line],
            [b.efficiency for b in line],
        )
        for axes, ys in zip(panels, values, strict=True):
            known = [(x, y) for x, y in zip(gpus, ys, strict=True) if y is not None]
            axes.plot(*zip(*known, strict=True), color=color, marker="o", markersize=4, lw=1.5, label=label[setting])
        for row in (r for r in rows if r.setting == setting and r.ok):
            for axes, y in zip(panels, (row.seconds, row.tokens_per_second_per_gpu), strict=False):
                if y is not None:
                    axes.plot(row.layout.gpus, y, ".", color=color, alpha=0.3, markeredgewidth=0)
    for axes, unit in zip(panels, ("seconds per update", "tokens/s/GPU", "efficiency"), strict=True):
        style(axes, unit, log=False)
        axes.set_xscale("log", base=2)
        ticks = sorted({b.row.layout.gpus for b in best})
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        _from_zero(axes)
    panels[2].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[2].set_xlabel("GPUs", fontsize=9, color=INK)
    _legend(panels[0], len(label) > 1)
    return _png(figure)


def draw_bubble(rows: Rows) -> bytes | None:
    """Plot measured, predicted and closed-form bubble fraction by stages, chunks and micro-batches."""
    shown = [r for r in rows if r.ok and r.bubble_fraction is not None and r.layout.parallel.pipeline > 1]
    if not shown:
        return None
    figure, panels = _figure("Pipeline bubble", 3, 6.6)
    axis_of: tuple[tuple[str, Callable[[MeasuredRow], int]], ...] = (
        ("pipeline stages (PP)", lambda r: r.layout.parallel.pipeline),
        ("chunks per stage (VPP)", lambda r: r.layout.parallel.virtual_pipeline),
        ("micro-batches per replica", lambda r: r.micro_batches or 0),
    )
    for axes, (name, key) in zip(panels, axis_of, strict=True):
        style(axes, f"share of the step by {name}", log=False)
        _draw_bubbles(axes, sorted(shown, key=lambda r: (key(r), r.closed_form or 0, r.name)), key)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _from_zero(axes)
        axes.grid(False, axis="x")
    _legend(panels[0], True)
    return _png(figure)


def _draw_bubbles(axes: Axes, rows: Rows, key: Callable[[MeasuredRow], int]) -> None:
    """Plot rows side by side, grouped by their value of `key`."""
    ticks, names, position = [], [], 0.0
    for value, group in groupby(rows, key=key):
        slots = [(position + i, row) for i, row in enumerate(group)]
        ticks.append((slots[0][0] + slots[-1][0]) / 2)
        names.append(str(value) if value else "unknown")
        position = slots[-1][0] + 2
        axes.axvspan(slots[0][0] - 0.5, slots[-1][0] + 0.5, color=GRID, alpha=0.5, linewidth=0)
        for x, row in slots:
            values = [v for v in (row.bubble_fraction, row.predicted.bubble, row.closed_form) if v is not None]
            axes.plot([x, x], [min(values), max(values)], color="#c4c9ce", linewidth=1)
    xs = [x for x, _ in _slots(rows, key)]
    kinds: tuple[tuple[str, list[float | None], dict[str, Any]], ...] = (
        ("closed form", [r.closed_form for r in rows], {"marker": "_", "color": INK, "markersize": 9}),
        ("predicted", [r.predicted.bubble for r in rows], {"marker": "D", "color": ORANGE, "fillstyle": "none"}),
        ("measured", [r.bubble_fraction for r in rows], {"marker": "o", "color": BLUE}),
    )
    for label, ys, marker in kinds:
        known = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
        if known:
            axes.plot(*zip(*known, strict=True), linestyle="", label=label, **{"markersize": 4.5, **marker})
    axes.set_xticks(ticks, names)


def _slots(rows: Rows, key: Callable[[MeasuredRow], int]) -> list[tuple[float, MeasuredRow]]:
    """Return the rows with their x positions."""
    positions: list[tuple[float, MeasuredRow]] = []
    for row in rows:
        step = 0.0 if not positions else 1.0 if key(positions[-1][1]) == key(row) else 2.0
        positions.append(((positions[-1][0] if positions else 0.0) + step, row))
    return positions


def draw_causes(rows: Rows) -> bytes | None:
    """Plot the idle time of each stage by cause, as shares of the step, for layouts with a timeline."""
    with_causes = [r for r in rows if r.ok and r.layout.parallel.pipeline > 1 and r.seconds and _has_causes(r)]
    chosen = findings.shown_timelines(with_causes) or findings.ranked(with_causes)
    if not chosen:
        return None
    chosen = chosen[:_CAUSE_PANELS]
    label = findings.labels(rows)
    figure, panels = _figure("Idle time by cause and stage", len(chosen), 1.1 + 1.75 * len(chosen))
    for axes, row in zip(panels, chosen, strict=True):
        style(axes, label[row.name], log=False)
        below = [0.0] * len(row.stages)
        for cause in CAUSES:
            shares = [(getattr(s, cause) or 0.0) / _step_of(row) for s in row.stages]
            axes.bar([s.stage for s in row.stages], shares, bottom=below, color=_CAUSE_COLORS[cause], label=cause)
            below = [a + b for a, b in zip(below, shares, strict=True)]
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.grid(False, axis="x")
    panels[-1].set_xlabel("stage", fontsize=9, color=INK)
    handles, names = panels[0].get_legend_handles_labels()
    names = [name.replace("_", " ") for name in names]
    where: dict[str, Any] = {"loc": "upper right", "bbox_to_anchor": (0.985, 0.995), "ncols": 4, "columnspacing": 1.1}
    figure.legend(handles, names, **where, **_LEGEND)
    return _png(figure)


def _has_causes(row: MeasuredRow) -> bool:
    return any(getattr(s, cause) is not None for s in row.stages for cause in CAUSES)


def _step_of(row: MeasuredRow) -> float:
    """Return the seconds of the pipeline that the causes refer to; an update also includes the optimizer."""
    if row.timeline is not None:
        return row.timeline.step
    assert row.seconds is not None
    return row.seconds


def draw_predicted_time(rows: Rows) -> bytes | None:
    """Plot predicted over measured time."""
    points = [(r.predicted.seconds, r.seconds, r) for r in rows if r.ok and r.seconds and r.predicted.seconds]
    if not points:
        return None
    figure, (axes,) = _figure("Predicted and measured time", 1, 4.4)
    label = _setting_labels([r for _, _, r in points])
    for color, setting in zip(_colors(), label, strict=False):
        own = [(x, y) for x, y, r in points if r.setting == setting]
        axes.plot(*zip(*own, strict=True), "o", color=color, markersize=5, alpha=0.8, label=label[setting])
    _square(axes, [v for x, y, _ in points if x is not None and y is not None for v in (x, y)])
    _name_axes(axes, "measured seconds", "predicted seconds")
    _legend(axes, True)
    return _png(figure)


def draw_predicted_memory(rows: Rows) -> bytes | None:
    """Plot predicted over measured memory by stage; out-of-memory layouts at their last peak or the GPU's limit."""
    points = [
        (predicted / _GIGA, stage.peak_memory_bytes / _GIGA, stage.stage)
        for r in rows
        if r.ok
        for stage, predicted in zip(r.stages, r.predicted.stage_memory_bytes, strict=False)
        if stage.peak_memory_bytes is not None
    ]
    failed = [(r.predicted.memory_bytes / _GIGA, limit / _GIGA) for r in rows if r.predicted.memory_bytes
              for limit in [_memory_limit(r)] if r.status == "out_of_memory" and limit is not None]  # fmt: skip
    if not points and not failed:
        return None
    figure, (axes,) = _figure("Predicted and measured memory", 1, 4.4)
    last = max((stage for *_, stage in points), default=0)
    if points:
        colors = [stage / max(1, last) for *_, stage in points]
        xs, ys = [x for x, *_ in points], [y for _, y, _ in points]
        dots = axes.scatter(xs, ys, c=colors, cmap="viridis", s=22, linewidths=0, alpha=0.85, label="a stage's peak")
        bar = figure.colorbar(dots, ax=axes, fraction=0.04, pad=0.02, ticks=[0, 1] if last else [0])
        bar.ax.set_yticklabels(["first", "last"] if last else ["only"])
        bar.outline.set_visible(False)
        bar.ax.set_title("stage", fontsize=8, color=INK)
        bar.ax.tick_params(length=0, labelsize=8, labelcolor=INK)
    if failed:
        axes.plot(*zip(*failed, strict=True), "x", color=RED, markersize=7, label="out of memory")
    _square(axes, [v for x, y, *_ in points for v in (x, y)] + [v for pair in failed for v in pair])
    _name_axes(axes, "measured GB", "predicted GB")
    _legend(axes, True)
    return _png(figure)


def _memory_limit(row: MeasuredRow) -> float | None:
    if row.peak_memory is not None:
        return row.peak_memory
    try:
        return find_hardware(row.gpu).gpu.memory
    except ValueError:
        return None


def draw_mfu(rows: Rows) -> bytes | None:
    """Plot the MFU of each layout."""
    shown = sorted((r for r in rows if r.ok and r.mfu), key=lambda r: (-(r.mfu or 0), r.name))[:_BARS]
    if not shown:
        return None
    figure, (axes,) = _bar_figure("Model FLOP/s utilization", len(shown))
    label = findings.labels(rows)
    axes.barh(range(len(shown)), [r.mfu or 0 for r in shown], color=BLUE, height=0.7)
    for i, row in enumerate(shown):
        axes.text(row.mfu or 0, i, f" {row.mfu:.1%}", va="center", fontsize=8, color=INK)
    _finish_bars(axes, "share of the data-sheet peak", [label[r.name] for r in shown])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return _png(figure)


def draw_losses(rows: Rows) -> bytes | None:
    """Plot update times of FIPO and plain cross-entropy on the same layout."""
    pairs = findings.loss_pairs(rows)[:_BARS]
    if not pairs:
        return None
    figure, (axes,) = _bar_figure("FIPO against plain cross-entropy", len(pairs))
    label = findings.labels([pair.fipo for pair in pairs])
    for i, pair in enumerate(pairs):
        assert pair.fipo.seconds is not None
        assert pair.plain.seconds is not None
        axes.barh(i - 0.19, pair.fipo.seconds, color=BLUE, height=0.36, label="" if i else "fipo")
        axes.barh(i + 0.19, pair.plain.seconds, color=GREY, height=0.36, label="" if i else "lm")
        longest = max(pair.fipo.seconds, pair.plain.seconds)
        axes.text(longest, i, f" {pair.ratio - 1:+.1%}", va="center", fontsize=8, color=INK)
    _finish_bars(axes, "seconds per update", [label[pair.fipo.name] for pair in pairs])
    _legend(axes, True)
    return _png(figure)


FIGURES = (
    ScalingFigure(
        "scaling",
        "Scaling",
        "Lines: best layout at each number of GPUs; dots: all layouts. Efficiency is tokens/s/GPU relative to "
        "the fewest GPUs.",
        draw_scaling,
    ),
    ScalingFigure(
        "bubble",
        "Pipeline bubble",
        "One column per layout. Far above the closed form, (p-1)/(m v + p-1): stages or micro-batches are unequal, or "
        "messages are slow. Far above the prediction: see its timeline.",
        draw_bubble,
    ),
    ScalingFigure(
        "causes",
        "Idle time by cause and stage",
        "As shares of the pipeline's time. Warm-up and drain fall with more micro-batches or chunks; waiting means a "
        "slower stage elsewhere; communication is message transfer.",
        draw_causes,
    ),
    ScalingFigure(
        "mfu",
        "Model FLOP/s utilization",
        "Model FLOPs without recomputation, relative to the GPUs' peak over the same time.",
        draw_mfu,
    ),
    ScalingFigure(
        "predicted_time",
        "Predicted and measured time",
        "One dot per layout. Above the line: predicted too slow. A common factor is corrected by calibration, "
        "scatter is not.",
        draw_predicted_time,
    ),
    ScalingFigure(
        "predicted_memory",
        "Predicted and measured memory",
        "One dot per stage: its fullest rank. Above the line: predicted too high. Crosses: layouts that ran out of "
        "memory, at their last peak.",
        draw_predicted_memory,
    ),
    ScalingFigure(
        "losses",
        "FIPO against plain cross-entropy",
        "The same batch through the same layout; the difference is the cost of the loss per update.",
        draw_losses,
    ),
)


def _setting_labels(rows: Rows) -> dict[tuple[str, str, str], str]:
    """Return labels that distinguish the settings."""
    found = findings.settings(rows)
    differing = [i for i in range(3) if len({setting[i] for setting in found}) > 1]
    return {setting: figure_text(", ".join(setting[i] for i in differing)) or "a layout" for setting in found}


def _colors() -> list[str]:
    return list(_SERIES) * 10


def _figure(title: str, panels: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
    top, bottom = 1 - 0.62 / height, 0.5 / height
    figure.subplots_adjust(left=0.1, right=0.96, top=top, bottom=bottom, hspace=0.45)
    style: dict[str, Any] = {"ha": "left", "va": "top", "fontsize": 11.5, "fontweight": "bold", "color": INK}
    figure.suptitle(title, x=0.02, y=1 - 0.1 / height, **style)
    return figure, axes


def _bar_figure(title: str, bars: int) -> tuple[Figure, list[Axes]]:
    figure, axes = _figure(title, 1, 1.3 + 0.3 * bars)
    figure.subplots_adjust(left=0.42)
    return figure, axes


def _finish_bars(axes: Axes, unit: str, names: Sequence[str]) -> None:
    style(axes, unit, log=False)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.15)
    axes.set_xlim(left=0)


def _square(axes: Axes, values: Sequence[float]) -> None:
    """Use equal scales on both axes, with the diagonal; logarithmic if needed."""
    style(axes, "", log=False)
    low, high = min(values), max(values)
    log = high > 20 * low > 0
    limits = (low / 1.2, high * 1.2) if log else (0.0, high * 1.08 or 1.0)
    if log:
        axes.set_xscale("log")
        axes.set_yscale("log")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlim(limits)
    axes.set_ylim(limits)
    axes.plot(limits, limits, color=GREY, linewidth=0.9, zorder=0)


def _from_zero(axes: Axes) -> None:
    """Start the axis at 0, with space above the highest marker."""
    axes.set_ylim(0, axes.get_ylim()[1] * 1.08)


def _name_axes(axes: Axes, top: str, bottom: str) -> None:
    axes.set_title(top, loc="left", fontsize=9, color=INK, pad=5)
    axes.set_xlabel(bottom, fontsize=9, color=INK)


def _legend(axes: Axes, needed: bool) -> None:
    """Draw the legend above the panel at its right, where it covers no data."""
    handles, names = axes.get_legend_handles_labels()
    if needed and handles:
        where: dict[str, Any] = {
            "loc": "lower right",
            "bbox_to_anchor": (1.0, 1.0),
            "ncols": min(3, len(names)),
            "borderaxespad": 0.1,
        }
        axes.legend(handles, names, **where, **_LEGEND)


def _png(figure: Figure) -> bytes:
    for text in figure.findobj(Text):  # names with two dollar signs are not formulas
        text.set_parse_math(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()
