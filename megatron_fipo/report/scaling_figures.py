"""All figures of a scaling study, and those of speed: scaling of layouts, MFU, and the cost of the loss.

Each function takes rows and returns a PNG, or None if they have no data for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from matplotlib.ticker import NullLocator, PercentFormatter

from megatron_fipo.report import scaling_findings as findings
from megatron_fipo.report.panels import BLUE, GREY, INK, style
from megatron_fipo.report.scaling_bubble import draw_bubble, draw_causes
from megatron_fipo.report.scaling_panels import (
    Rows,
    bar_panel,
    colors,
    finish_bars,
    from_zero,
    legend_above,
    png,
    setting_labels,
    stacked_panels,
)
from megatron_fipo.report.scaling_predictions import draw_predicted_memory, draw_predicted_time

_BARS = 24  # maximum layouts in a bar chart


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
    figure, panels = stacked_panels("Scaling", 3, 6.6)
    label = setting_labels(rows)
    for color, (setting, own) in zip(colors(), groupby(best, key=lambda b: b.row.setting), strict=False):
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
        from_zero(axes)
    panels[2].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[2].set_xlabel("GPUs", fontsize=9, color=INK)
    legend_above(panels[0], len(label) > 1)
    return png(figure)


def draw_mfu(rows: Rows) -> bytes | None:
    """Plot the MFU of each layout."""
    shown = sorted((r for r in rows if r.ok and r.mfu), key=lambda r: (-(r.mfu or 0), r.name))[:_BARS]
    if not shown:
        return None
    figure, (axes,) = bar_panel("Model FLOP/s utilization", len(shown))
    label = findings.labels(rows)
    axes.barh(range(len(shown)), [r.mfu or 0 for r in shown], color=BLUE, height=0.7)
    for i, row in enumerate(shown):
        axes.text(row.mfu or 0, i, f" {row.mfu:.1%}", va="center", fontsize=8, color=INK)
    finish_bars(axes, "share of the data-sheet peak", [label[r.name] for r in shown])
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return png(figure)


def draw_losses(rows: Rows) -> bytes | None:
    """Plot update times of FIPO and plain cross-entropy on the same layout."""
    pairs = findings.loss_pairs(rows)[:_BARS]
    if not pairs:
        return None
    figure, (axes,) = bar_panel("FIPO against plain cross-entropy", len(pairs))
    label = findings.labels([pair.fipo for pair in pairs])
    for i, pair in enumerate(pairs):
        assert pair.fipo.seconds is not None
        assert pair.plain.seconds is not None
        axes.barh(i - 0.19, pair.fipo.seconds, color=BLUE, height=0.36, label="" if i else "fipo")
        axes.barh(i + 0.19, pair.plain.seconds, color=GREY, height=0.36, label="" if i else "lm")
        longest = max(pair.fipo.seconds, pair.plain.seconds)
        axes.text(longest, i, f" {pair.ratio - 1:+.1%}", va="center", fontsize=8, color=INK)
    finish_bars(axes, "seconds per update", [label[pair.fipo.name] for pair in pairs])
    legend_above(axes, True)
    return png(figure)


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
