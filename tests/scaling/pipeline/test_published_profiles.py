"""Published profiles of pipeline stages, replayed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PATH = Path(__file__).parents[3] / "benchmarks" / "pipeline_replay.py"


def _load() -> ModuleType:
    spec = util.spec_from_file_location("pipeline_replay", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


REPLAY = _load()
REPLAYS = REPLAY.replays()


@pytest.mark.parametrize(
    "replay", [r for r in REPLAYS if r.kind in REPLAY.MEGATRON], ids=lambda r: f"{r.name}, {r.kind}"
)
def test_step_of_measured_stages(replay: Any) -> None:
    """Where each stage and the step were measured in one run of Megatron's 1F1B, the steps agree to 2 %."""
    assert abs(replay.step_error) < 0.02
    assert abs(replay.bubble_error) < 0.02


def test_all_profiles_are_replayed() -> None:
    """11 of Megatron's 1F1B, 19 of schedules that divide the vocabulary, 12 with one time for all stages."""
    kinds = [r.kind for r in REPLAYS]
    assert sum(k in REPLAY.MEGATRON for k in kinds) == 11
    assert sum(k in ("1F1B", "interleaved") for k in kinds) == 12
    assert len(kinds) == 42


@pytest.mark.parametrize("replay", [r for r in REPLAYS if r.kind in ("1F1B", "interleaved")], ids=lambda r: r.name)
def test_bubble_of_typical_stages(replay: Any) -> None:
    """With transfers that cost time, bubbles are those that the source computed from the same profile, to 0.005."""
    assert abs(replay.bubble_error) < 0.005


@pytest.mark.slow
def test_benchmark_ends_with_json() -> None:
    """The last line is JSON, as of every benchmark."""
    lines = subprocess.run([sys.executable, str(PATH)], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert json.loads(lines.splitlines()[-1])["megatron_rows"] == 11
