"""A plan's CSV as layouts to measure; and the name and row of a layout that cannot be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import ParallelConfig
from megatron_fipo.scaling.cost.hardware import find_hardware
from megatron_fipo.scaling.cost.layout import Layout, Recompute
from megatron_fipo.scaling.cost.model_shapes import find_model
from megatron_fipo.scaling.cost.sequence_lengths import Sequences
from megatron_fipo.scaling.measure.row_writer import write_failed_row
from megatron_fipo.scaling.measure.run_command import measure
from megatron_fipo.scaling.measure.specification import Measurement, measurement_name
from megatron_fipo.scaling.planner import plan_tables
from megatron_fipo.scaling.planner.plan_csv import plan_line, read_plan
from megatron_fipo.scaling.planner.planner import Planner
from tests.support.policies import make_config, make_qwen2

PARALLEL = ParallelConfig(world_size=8, tensor=2, pipeline=4, sequence=True, first_stage_layers=5, last_stage_layers=3)
EVEN = {"first_stage_layers": None, "last_stage_layers": None}
LINE = Layout(PARALLEL, 4096, "full")
TEXT = {
    "gpus": "8",
    "tensor": "2",
    "pipeline": "4",
    "virtual_pipeline": "1",
    "context": "1",
    "expert": "1",
    "first_stage_layers": "5",
    "last_stage_layers": "3",
    "tokens_per_micro_batch": "4096",
    "recompute": "full",
}


def _changed(recompute: Recompute = "full", **changes: Any) -> Layout:
    return replace(LINE, parallel=replace(PARALLEL, **changes), recompute=recompute)


def _write(path: Path, **changes: str | None) -> Path:
    line = {name: text for name, text in (TEXT | changes).items() if text is not None}
    path.write_text(",".join(line) + "\n" + ",".join(line.values()) + "\n")
    return path


def test_what_plan_writes_is_read(tmp_path: Path) -> None:
    """Every layout of a plan comes back from its CSV, in order."""
    made = Planner(find_model("qwen2.5-7b"), find_hardware("H100-80"), Sequences((4096,) * 64)).plan(8)
    plan_tables.write_csv(tmp_path / "plan.csv", made.candidates)
    base = make_config("unused")
    read = read_plan(tmp_path / "plan.csv")
    assert len(read) == len(made.candidates) > 10
    for line, candidate in zip(read, made.candidates, strict=True):
        config = line.applied(base)
        assert config.parallel == candidate.layout.parallel
        assert config.model.recompute == candidate.layout.recompute
        assert config.trainer.tokens_per_micro_batch == candidate.layout.tokens_per_micro_batch


def test_one_line(tmp_path: Path) -> None:
    """Sequence parallelism goes with tensor parallelism unless the file says otherwise; no layers means even stages."""
    plan = _write(tmp_path / "plan.csv")
    assert plan_line(plan, 1) == LINE
    assert plan_line(_write(plan, sequence="False"), 1) == _changed(sequence=False)
    assert plan_line(_write(plan, first_stage_layers=""), 1) == _changed(first_stage_layers=None)
    free = _changed(**EVEN, pipeline_layout="Et|t,(t|)*2L")
    columns = {"first_stage_layers": "", "last_stage_layers": "", "pipeline_layout": '"Et|t,(t|)*2L"'}
    assert plan_line(_write(plan, **columns), 1) == free


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus": "eight"}, "line 1 of .*: gpus must be an integer of at least 1, got 'eight'"),
        ({"tensor": "0"}, "tensor must be an integer of at least 1, got '0'"),
        ({"pipeline": None}, "line 1 of .* has no column pipeline"),
        ({"recompute": "some"}, "recompute must be one of none, selective, full, got 'some'"),
        (
            {"pipeline_layout": "Et|X"},
            r"line 1 of .*: parallel.pipeline_layout 'Et\|X': 'X' at position 4 must be E, t",
        ),
        ({"sequence": "2"}, "sequence must be True or False, got '2'"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, str | None], message: str, tmp_path: Path) -> None:
    """A file that is no plan is refused with its line and column."""
    with pytest.raises(ValueError, match=message):
        read_plan(_write(tmp_path / "plan.csv", **changes))


def test_lines_that_are_not_there(tmp_path: Path) -> None:
    """A missing file, an empty one, a number beyond the end."""
    with pytest.raises(ValueError, match="does not exist; `megatron-fipo scaling plan"):
        read_plan(tmp_path / "none.csv")
    plan = _write(tmp_path / "plan.csv")
    with pytest.raises(ValueError, match=r"line 2 of .*: must be 1 to 1"):
        plan_line(plan, 2)
    plan.write_text("gpus\n")
    with pytest.raises(ValueError, match="contains no layouts"):
        read_plan(plan)


def test_names() -> None:
    """A name tells all that a plan varies, in characters that every file system takes."""
    config = LINE.applied(make_config("/models/Qwen2.5 32B"))
    name = measurement_name(config, "H100-80", "fipo")
    assert name == "qwen2.5-32b-h100-80-g8-tp2-pp4-f5-l3-vpp1-cp1-ep1-t4096-full-fipo"
    free = _changed(**EVEN, pipeline_layout="E|t*2|t*2|L")
    name = measurement_name(free.applied(make_config("/models/Qwen2.5-32B")), "H100-80", "fipo")
    assert name == "qwen2.5-32b-h100-80-g8-tp2-pp4-s0.2x2.0-vpp1-cp1-ep1-t4096-full-fipo"
    even = _changed(**EVEN, recompute="none")
    name = measurement_name(even.applied(make_config("/models/Qwen2.5-32B")), "H100-80", "lm")
    assert name == "qwen2.5-32b-h100-80-g8-tp2-pp4-vpp1-cp1-ep1-t4096-none-lm"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor": 8}, r"4 attention heads / tp 8 = 0.50"),
        (
            {**EVEN, "pipeline": 8, "world_size": 16},
            r"4 layers / \(8 stages",
        ),
        (
            {**EVEN, "pipeline_layout": "Et|t|t|t*2L"},
            r"parallel.pipeline_layout 'Et\|t\|t\|t\*2L' has 5 decoder layers \(t\), but the model has 4",
        ),
        ({"world_size": 9}, r"tp 2 x pp 4 x cp 1 = 8 does not divide the 9 GPUs"),
    ],
)
def test_illegal_layouts_are_rows(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """One of a plan is refused with the arithmetic before any rank starts, and is a failed row; others leave none."""
    config = _changed(**changes).applied(make_config(make_qwen2(tmp_path / "model", layers=4)))
    asked = Measurement(config, Sequences((50,) * 8), "fipo", "cpu", find_hardware("H100-80"), tmp_path)
    for planned in (False, True):
        with pytest.raises(ValueError, match=message):
            measure(asked, lengths_given=True, planned=planned, again=False)
        assert asked.row_path.exists() == planned
    row = json.loads(asked.row_path.read_text())
    assert row["status"] == "failed"
    assert "\n" not in row["error"]
    assert row["gpus"] == config.parallel.world_size
    assert row["predicted"] is row["seconds"] is None


def test_prediction_is_the_planner_s(tmp_path: Path) -> None:
    """A row has the planner's prediction of a layout that failed, too, on the fullest stage and each."""
    config = make_config(make_qwen2(tmp_path / "model", layers=4), parallel={"pipeline": 2, "world_size": 2})
    hardware, sequences = find_hardware("H100-80"), Sequences((50, 90, 120, 30))
    asked = Measurement(config, sequences, "fipo", "H100-80", hardware, tmp_path)
    row = write_failed_row(asked, "an [error]\nin two lines")
    expected = Planner(find_model(str(tmp_path / "model")), hardware, sequences).evaluate(Layout.of(config))
    assert row["predicted"]["seconds"] == expected.cost.seconds
    assert row["predicted"]["memory_bytes"] == expected.memory.total
    tensors = expected.memory.total - expected.memory.reserve
    assert row["predicted"]["stage_memory_bytes"][expected.stage] == tensors
    assert len(row["predicted"]["stage_memory_bytes"]) == 2
    assert row["error"] == "an [error]"
    assert row["peak_memory_bytes"] == [None, None]
    assert row["micro_batches"] == len(expected.batch.sizes) == 2
