"""Rows of a scaling study as they are read: strict about what they are about, and telling what else is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.scaling.measure.row_reader import parse_row, read_rows
from tests.support.studies import lost, make_row, write_study


def test_numbers_are_those_of_the_file() -> None:
    """Fields of the row, of its stages, prediction and timeline are checked; further ones are left alone."""
    content = make_row(8, 4, 2, 8, something="new")
    row, problems = parse_row(content)
    assert problems == []
    for name in ("seconds", "tokens", "mfu", "bubble_fraction", "idle_over_ideal", "tokens_per_second_per_gpu"):
        assert getattr(row, name) == content[name]
    assert {name: row.layout.record()[name] for name in content if name in row.layout.record()} == {
        name: content[name] for name in content if name in row.layout.record()
    }
    assert row.closed_form == 3 / 19
    assert [vars(s) for s in row.stages] == content["stages"]
    assert row.predicted.stage_memory_bytes == tuple(content["predicted"]["stage_memory_bytes"])
    assert row.peak_memory == 40e9
    assert row.timeline is not None
    assert row.timeline.bubble_fraction == row.bubble_fraction
    assert row.layout.parallel.pipeline_layout is None
    assert parse_row(content | {"pipeline_layout": "E|t|L|"})[0].layout.parallel.pipeline_layout == "E|t|L|"
    assert row.environment == {"python": "3.11", "torch": "2.13.0", "hosts": "n1 n2"}


def test_lost_rows_have_no_problems() -> None:
    """A value that was not measured is unknown; the memory that ranks reported is kept."""
    row, problems = parse_row(lost(make_row(), "out_of_memory", "no memory"))
    assert problems == []
    assert (row.seconds, row.peak_memory_bytes, row.error, row.stages) == (None, (84.5e9,), "no memory", ())


@pytest.mark.parametrize("value", [None, "fast", True, math.nan, math.inf, -1.0, 10**400])
@pytest.mark.parametrize("name", ["seconds", "tokens_per_second_per_gpu", "closed_form_bubble_fraction", "tokens"])
def test_odd_numbers_are_unknown_and_named(name: str, value: Any) -> None:
    """Whatever stands there: the rest of the row is good."""
    row, problems = parse_row(make_row() | {name: value})
    assert getattr(row, name.removesuffix("_bubble_fraction")) is None
    assert [problem.split()[0] for problem in problems] == [name]
    assert row.peak_memory == 40e9


@pytest.mark.parametrize(
    "name", ["stages", "timeline", "predicted", "peak_memory_bytes", "step_seconds", "environment"]
)
@pytest.mark.parametrize("value", [5, "text", [[1]], {"stages": [[["forward", 0, 1]]], "chunks": 1}])
def test_odd_parts_are_unknown_and_named(name: str, value: Any) -> None:
    """A part of another shape; a mapping may stand where names of any kind are."""
    row, problems = parse_row(make_row() | {name: value})
    assert row.seconds == make_row()["seconds"]
    assert any(name in problem for problem in problems) or (name in ("predicted", "environment") and len(value) == 2)


WRONG: dict[str, Any] = {
    "gpus": 0,
    "pipeline": "2",
    "tensor": 1.5,
    "status": "done",
    "model": None,
    "recompute": 3,
    "sequence": "yes",
    "pipeline_layout": ["Et|tL"],
}


@pytest.mark.parametrize("name", WRONG)
def test_rows_about_nothing_are_refused(name: str) -> None:
    """With the field's name and what stands there."""
    with pytest.raises(ValueError, match=rf"{name} must be .*, got "):
        parse_row(make_row() | {name: WRONG[name]})


def test_damaged_files_are_left_out(tmp_path: Path) -> None:
    """Half a file, no object, a directory and bytes that are no text: named; the good row is read."""
    study = write_study(tmp_path, make_row())
    (study / "rows" / "half.json").write_text(json.dumps(make_row())[:300])
    (study / "rows" / "list.json").write_text("[1]")
    (study / "rows" / "bytes.json").write_bytes(b"\xff\xfe\x00")
    (study / "rows" / "folder.json").mkdir()
    rows, warnings = read_rows(study)
    assert len(rows) == 1
    assert [w.split()[0] for w in warnings] == [f"rows/{n}.json" for n in ("bytes", "folder", "half", "list")]


def test_no_row_is_the_users(tmp_path: Path) -> None:
    """An empty directory, and one whose only row is damaged, which is told."""
    with pytest.raises(ValueError, match="no measured rows in"):
        read_rows(tmp_path)
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "half.json").write_text("{")
    with pytest.raises(ValueError, match=r"rows/half.json is skipped"):
        read_rows(tmp_path)
