"""Figures of a scaling study's predictions: predicted and measured time and memory.

Each function takes rows and returns a PNG, or None if they have no data for it.
"""

from __future__ import annotations

from megatron_fipo.report.panels import INK, RED
from megatron_fipo.report.scaling_panels import (
    Rows,
    colors,
    legend_above,
    name_axes,
    png,
    setting_labels,
    square,
    stacked_panels,
)
from megatron_fipo.scaling.cost.hardware import find_hardware
from megatron_fipo.scaling.measure.row_reader import MeasuredRow

_GIGA = 1e9


def draw_predicted_time(rows: Rows) -> bytes | None:
    """Plot predicted over measured time."""
    points = [(r.predicted.seconds, r.seconds, r) for r in rows if r.ok and r.seconds and r.predicted.seconds]
    if not points:
        return None
    figure, (axes,) = stacked_panels("Predicted and measured time", 1, 4.4)
    label = setting_labels([r for _, _, r in points])
    for color, setting in zip(colors(), label, strict=False):
        own = [(x, y) for x, y, r in points if r.setting == setting]
        axes.plot(*zip(*own, strict=True), "o", color=color, markersize=5, alpha=0.8, label=label[setting])
    square(axes, [v for x, y, _ in points if x is not None and y is not None for v in (x, y)])
    name_axes(axes, "measured seconds", "predicted seconds")
    legend_above(axes, True)
    return png(figure)


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
    figure, (axes,) = stacked_panels("Predicted and measured memory", 1, 4.4)
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
    square(axes, [v for x, y, *_ in points for v in (x, y)] + [v for pair in failed for v in pair])
    name_axes(axes, "measured GB", "predicted GB")
    legend_above(axes, True)
    return png(figure)


def _memory_limit(row: MeasuredRow) -> float | None:
    if row.peak_memory is not None:
        return row.peak_memory
    try:
        return find_hardware(row.gpu).gpu.memory
    except ValueError:
        return None
