"""The figure of a timeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fipo.scaling.figure import draw, write_figure
from megatron_fipo.scaling.schedule import Schedule
from megatron_fipo.scaling.simulate import Communication, simulate


def test_bars_are_the_spans(tmp_path: Path) -> None:
    """Each pass is a bar from its start to its end on its stage's row; a file is written whole."""
    timeline = simulate(Schedule(2, 4, 2), 0.5, 1.0, Communication(0.25))
    (axes,) = draw(timeline, "pp 2, vpp 2").axes
    bars = sorted((bar.get_x(), bar.get_y() + 0.4, bar.get_width()) for bar in axes.patches if bar.get_height() == 0.8)
    spans = sorted((s.start, stage, s.seconds) for stage in range(2) for s in timeline.passes(stage))
    assert bars == [pytest.approx(span) for span in spans]
    assert f"bubble {timeline.bubble_fraction:.1%}" in axes.get_title()
    write_figure(tmp_path / "timeline.png", timeline)
    assert [p.name for p in tmp_path.iterdir()] == ["timeline.png"]
    assert (tmp_path / "timeline.png").read_bytes()[:4] == b"\x89PNG"
