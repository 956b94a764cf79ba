"""Panels of a scaling study's figures: sizes, legends, scales and colours."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from megatron_fipo.report import scaling_findings as findings
from megatron_fipo.report.panels import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, style
from megatron_fipo.report.parts import figure_text
from megatron_fipo.scaling.measure.row_reader import MeasuredRow

_WIDTH, _DPI = 6.4, 150  # like the figures of a training run
_SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)
LEGEND: dict[str, Any] = {
    "frameon": False,
    "fontsize": 8,
    "labelcolor": INK,
    "handlelength": 1.1,
    "handletextpad": 0.4,
}
Rows: TypeAlias = Sequence[MeasuredRow]


def setting_labels(rows: Rows) -> dict[tuple[str, str, str], str]:
    """Return labels that distinguish the settings."""
    found = findings.settings(rows)
    differing = [i for i in range(3) if len({setting[i] for setting in found}) > 1]
    return {setting: figure_text(", ".join(setting[i] for i in differing)) or "a layout" for setting in found}


def colors() -> list[str]:
    """Return the colours of series, repeated."""
    return list(_SERIES) * 10


def stacked_panels(title: str, panels: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with its title and `panels` axes from top to bottom."""
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(panels, 1, squeeze=False)[:, 0])
    top, bottom = 1 - 0.62 / height, 0.5 / height
    figure.subplots_adjust(left=0.1, right=0.96, top=top, bottom=bottom, hspace=0.45)
    style: dict[str, Any] = {"ha": "left", "va": "top", "fontsize": 11.5, "fontweight": "bold", "color": INK}
    figure.suptitle(title, x=0.02, y=1 - 0.1 / height, **style)
    return figure, axes


def bar_panel(title: str, bars: int) -> tuple[Figure, list[Axes]]:
    """Return a figure for horizontal bars, with space for their names."""
    figure, axes = stacked_panels(title, 1, 1.3 + 0.3 * bars)
    figure.subplots_adjust(left=0.42)
    return figure, axes


def finish_bars(axes: Axes, unit: str, names: Sequence[str]) -> None:
    """Name the bars, and style their axes."""
    style(axes, unit, log=False)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.15)
    axes.set_xlim(left=0)


def square(axes: Axes, values: Sequence[float]) -> None:
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


def from_zero(axes: Axes) -> None:
    """Start the axis at 0, with space above the highest marker."""
    axes.set_ylim(0, axes.get_ylim()[1] * 1.08)


def name_axes(axes: Axes, top: str, bottom: str) -> None:
    """Label the x axis, and the y axis above the panel."""
    axes.set_title(top, loc="left", fontsize=9, color=INK, pad=5)
    axes.set_xlabel(bottom, fontsize=9, color=INK)


def legend_above(axes: Axes, needed: bool) -> None:
    """Draw the legend above the panel at its right, where it covers no data."""
    handles, names = axes.get_legend_handles_labels()
    if needed and handles:
        where: dict[str, Any] = {
            "loc": "lower right",
            "bbox_to_anchor": (1.0, 1.0),
            "ncols": min(3, len(names)),
            "borderaxespad": 0.1,
        }
        axes.legend(handles, names, **where, **LEGEND)


def png(figure: Figure) -> bytes:
    """Return the figure as PNG."""
    for text in figure.findobj(Text):  # names with two dollar signs are not formulas
        text.set_parse_math(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    return image.getvalue()
