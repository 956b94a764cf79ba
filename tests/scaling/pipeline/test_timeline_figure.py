"""The figure of a timeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_fipo.scaling.pipeline.simulate import Communication, simulate
from megatron_fipo.scaling.pipeline.timeline_figure import draw, write_figure
from megatron_fipo.shapes.schedule import Schedule


def test_bars_are_the_spans(tmp_path: Path) -> None:
    """Each pass is a bar from its start to its end on its stage's row; a file is written whole."""
    timeline = simulate(Schedule(2, 4, 2), 0.5, 1.0, Communication(0.25))
    (axes,) = draw(timeline, "pp 2, vpp 2").axes
    corners = [path.vertices for kind in axes.collections for path in kind.get_paths() if len(path.vertices)]
    boxes = [(c[:, 0].min(), c[:, 1].min(), np.ptp(c[:, 0]), np.ptp(c[:, 1])) for c in corners]
    bars = sorted((left, low + 0.4, width) for left, low, width, height in boxes if height > 0.5)
    spans = sorted((s.start, stage, s.seconds) for stage in range(2) for s in timeline.passes(stage))
    assert bars == [pytest.approx(span) for span in spans]
    assert f"bubble {timeline.bubble_fraction:.1%}" in axes.get_title()
    write_figure(tmp_path / "timeline.png", timeline)
    assert [p.name for p in tmp_path.iterdir()] == ["timeline.png"]
    assert (tmp_path / "timeline.png").read_bytes()[:4] == b"\x89PNG"
