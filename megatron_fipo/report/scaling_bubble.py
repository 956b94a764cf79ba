"""Figures of the pipeline bubble of a scaling study: its size, and its causes by stage.

Each function takes rows and returns a PNG, or None if they have no data for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from megatron_fipo.report import scaling_findings as findings
from megatron_fipo.report.panels import BLUE, GREEN, GREY, GRID, INK, ORANGE, style
from megatron_fipo.report.scaling_panels import LEGEND, Rows, from_zero, legend_above, png, stacked_panels
from megatron_fipo.scaling.measure.row_reader import CAUSES, MeasuredRow
from megatron_fipo.scaling.pipeline.timeline import Bubble

_CAUSE_COLORS = dict(zip(CAUSES, (BLUE, GREY, GREEN, ORANGE), strict=True))
_CAUSE_PANELS = 4
assert tuple(f.name for f in fields(Bubble)) == CAUSES


def draw_bubble(rows: Rows) -> bytes | None:
    """Plot measured, predicted and closed-form bubble fraction by stages, chunks and micro-batches."""
    shown = [r for r in rows if r.ok and r.bubble_fraction is not None and r.layout.parallel.pipeline > 1]
    if not shown:
        return None
    figure, panels = stacked_panels("Pipeline bubble", 3, 6.6)
    axis_of: tuple[tuple[str, Callable[[MeasuredRow], int]], ...] = (
        ("pipeline stages (PP)", lambda r: r.layout.parallel.pipeline),
        ("chunks per stage (VPP)", lambda r: r.layout.parallel.virtual_pipeline),
        ("micro-batches per replica", lambda r: r.micro_batches or 0),
    )
    for axes, (name, key) in zip(panels, axis_of, strict=True):
        style(axes, f"share of the step by {name}", log=False)
        _draw_bubbles(axes, sorted(shown, key=lambda r: (key(r), r.closed_form or 0, r.name)), key)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        from_zero(axes)
        axes.grid(False, axis="x")
    legend_above(panels[0], True)
    return png(figure)


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
    figure, panels = stacked_panels("Idle time by cause and stage", len(chosen), 1.1 + 1.75 * len(chosen))
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
    figure.legend(handles, names, **where, **LEGEND)
    return png(figure)


def _has_causes(row: MeasuredRow) -> bool:
    return any(getattr(s, cause) is not None for s in row.stages for cause in CAUSES)


def _step_of(row: MeasuredRow) -> float:
    """Return the seconds of the pipeline that the causes refer to; an update also includes the optimizer."""
    if row.timeline is not None:
        return row.timeline.step
    assert row.seconds is not None
    return row.seconds
