"""Plot of a timeline: one row per stage, its passes by model chunk, and communication and waiting in between."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_fipo.atomic_file import write_atomically
from megatron_fipo.scaling.pipeline.timeline import Span, Timeline

_COLORS = {"forward": ("#2f6db3", "#93b8e0"), "backward": ("#2e8b62", "#9ccfb5")}  # first and last chunk
_MOVING, _WAITING = "#dd7a1f", "#e4e7ea"
_NUMBERED = 200  # micro-batches are numbered up to this many passes per stage


def draw(timeline: Timeline, title: str = "") -> Figure:
    """Plot a timeline."""
    stages = len(timeline.stages)
    figure = Figure(figsize=(12, 0.45 * stages + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for stage, spans in enumerate(timeline.stages):
        _draw_stage(axes, stage, spans, timeline.chunks)
    axes.set_yticks(range(stages), [_label(timeline, stage) for stage in range(stages)])
    axes.set_ylim(stages - 0.4, -0.6)
    axes.set_xlim(0, timeline.step)
    axes.set_xlabel("seconds")
    axes.set_title(
        f"{title}   step {timeline.step:.3g} s, bubble {timeline.bubble_fraction:.1%}".strip(), parse_math=False
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(handles=_legend(timeline.chunks), loc="outside lower center", ncols=6, frameon=False)
    return figure


def png(timeline: Timeline, title: str = "") -> bytes:
    """Return the plot as PNG."""
    image = io.BytesIO()
    draw(timeline, title).savefig(image, format="png", dpi=120, metadata={"Software": None})
    return image.getvalue()


def write_figure(path: Path, timeline: Timeline, title: str = "") -> None:
    """Write the plot as PNG, atomically."""
    write_atomically(path, png(timeline, title))


def _draw_stage(axes: Axes, stage: int, spans: Sequence[Span], chunks: int) -> None:
    """Draw one stage with one collection per kind of bar: an artist per span would take a minute for 10,000 spans."""
    passes = [span for span in spans if span.is_pass]
    calls = [span for span in spans if not span.is_pass]
    waits = [(span.start, span.seconds - span.transfer) for span in calls]
    moves = [(span.end - span.transfer, span.transfer) for span in calls]
    axes.broken_barh(waits, (stage - 0.15, 0.3), color=_WAITING)
    axes.broken_barh(moves, (stage - 0.15, 0.3), color=_MOVING)
    bars = [(span.start, span.seconds) for span in passes]
    colors = [_color(span, chunks) for span in passes]
    few = len(passes) <= _NUMBERED  # edges would hide many small bars
    axes.broken_barh(bars, (stage - 0.4, 0.8), facecolors=colors, edgecolor="white", linewidth=0.4 if few else 0)
    for span in passes if few else ():
        middle = (span.start + span.end) / 2
        axes.text(middle, stage, str(span.micro_batch), ha="center", va="center", fontsize=6, clip_on=True)


def _color(span: Span, chunks: int) -> tuple[float, ...]:
    """Interpolate between the colours of the first and the last chunk."""
    share = span.chunk / max(1, chunks - 1)
    ends = ([int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in _COLORS[span.name])
    return tuple((1 - share) * a + share * b for a, b in zip(*ends, strict=True))


def _label(timeline: Timeline, stage: int) -> str:
    return f"stage {stage}, idle {timeline.stage_bubble_fraction(stage):.0%}"


def _legend(chunks: int) -> list[Patch]:
    patches = [
        Patch(color=colors[i], label=f"{kind}" + (f", {which} chunk" if chunks > 1 else ""))
        for kind, colors in _COLORS.items()
        for i, which in enumerate(("first", "last")[: min(chunks, 2)])
    ]
    return [*patches, Patch(color=_WAITING, label="waiting in a call"), Patch(color=_MOVING, label="transfer")]
