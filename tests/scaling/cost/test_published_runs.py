"""The benchmark of the planner's accuracy: on a few rows, and what it promises on all of them."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.scaling.cost.hardware import hardware_files
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).parents[3]
ALL = ROOT / "benchmarks" / "data" / "published_throughput.csv"


def _run(*arguments: str) -> tuple[dict[str, Any], str]:
    """The last line, and all of them."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "scaling_accuracy.py"), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def _rows() -> list[dict[str, str]]:
    with ALL.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_small_file(tmp_path: Path) -> None:
    """Weak scaling of Llama 3.1 8B, told from its tokens/s alone in one row; what cannot be used is counted, with the
    reason; and rows of a source that was not fitted are held out."""
    sweep = [r for r in _rows() if r["model"] == "Llama 3.1 8b BF16" and "741c886" in r["source"]]
    assert len(sweep) == 5
    assert sweep[0]["source"].replace("@741c886", "") in hardware_files()["fitted_on"]
    changed = [{**r, "source": "another"} for r in sweep]
    changed[0]["step_time_s"] = ""
    unusable = [
        {**sweep[0], "notes": "WARNING contradicts itself"},
        {**sweep[0], "notes": "step_time = WHOLE RL step"},
        {**sweep[0], "tp": ""},
        {**sweep[0], "gpu": "TPUv5"},
        {**sweep[0], "precision": "int3"},
        {**sweep[0], "num_gpus": "eight"},
        {**sweep[0], "release": "next"},
    ]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(sweep[0]))
        writer.writeheader()
        writer.writerows(changed + unusable)
    figures, output = _run(str(tmp_path / "rows.csv"))
    assert figures["left_out"] == len(unusable)
    assert "left out: 1 rows, WARNING in notes" in output
    assert figures["dense"]["rows"] == figures["dense"]["held_out"]["rows"] == 5
    assert figures["dense"]["median_abs_error"] < 0.08
    assert figures["dense"]["rank_correlation"] > 0.85
    assert figures["moe"] == {
        **dict.fromkeys(("median_abs_error", "p90_abs_error", "rank_correlation")),
        "rows": 0,
        "held_out": figures["moe"]["held_out"],
        "naive": figures["moe"]["naive"],
    }


def test_releases_are_in_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The column has the release that notes or the source name: of containers, months of papers and pull requests."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from published_rows import release_of

    rows = _rows()
    named = [(row["release"], release_of(row)) for row in rows if release_of(row)]
    assert len(named) > 600
    assert [column for column, _ in named] == [release for _, release in named]
    assert {row["release"] for row in rows if "NeMo Container" in row["notes"]} == {
        "25.09", "25.11", "26.02", "26.02.01", "26.04", "26.04.01", "26.06", "26.06.01", "26.08",
    }  # fmt: skip
    assert {row["release"] for row in rows if "/pull/" in row["source"]} == {"26.07", "26.08"}


def test_pull_requests_are_not_fitted() -> None:
    """Nor are the 12 runs of experts in tables whose names come second; the fit's other sources are in the data."""
    sources = {row["source"] for row in _rows()}
    fitted = hardware_files()["fitted_on"]
    assert sum("/pull/" in source for source in sources) == 3
    assert not [source for source in fitted if "/pull/" in source]
    assert "github.com/NVIDIA-NeMo/Megatron-Bridge:docs/performance-summary.md" not in fitted
    assert "github.com/NVIDIA/dgxc-benchmarking:grok1/README.md" not in fitted
    plain = {re.sub(r"@[^:]*", "", source) for source in sources}
    assert set(fitted) <= plain


@pytest.mark.slow
def test_all_published_rows() -> None:
    """Dense runs, all and held out: median error 8%, p90 25%, rank correlation 0.85; less than half of the naive error.
    Mixtures of experts: median 15%, 20% held out, rank correlation 0.8, and better than the naive predictor. Nine of
    ten layouts rightly said to fit or not. The stored result is this one."""
    figures, output = _run()
    dense, memory = figures["dense"], figures["memory"]
    for part in (dense, dense["held_out"]):
        assert part["median_abs_error"] <= 0.08
        assert part["p90_abs_error"] <= 0.25
        assert part["rank_correlation"] >= 0.85
    assert dense["rows"] > 800
    assert dense["held_out"]["rows"] > 400
    assert dense["median_abs_error"] < dense["naive"]["median_abs_error"] / 2
    right = memory["ran_said_fits"] + memory["oom_said_oom"]
    assert right >= 0.9 * sum(memory.values())
    moe = figures["moe"]
    assert (moe["rows"], moe["held_out"]["rows"], moe["sweeps"]) == (153, 24, 12)
    assert moe["median_abs_error"] <= 0.15
    assert moe["held_out"]["median_abs_error"] <= 0.2
    assert moe["rank_correlation"] >= 0.8
    assert moe["p90_abs_error"] < moe["naive"]["p90_abs_error"] - 0.2
    assert moe["rank_correlation"] > moe["naive"]["rank_correlation"] + 0.1
    stored = (ROOT / "benchmarks" / "results" / "scaling_accuracy.txt").read_text()
    assert _without_last_digits(figures) == _without_last_digits(json.loads(stored.splitlines()[-1]))
    assert "mixtures of experts with |error| above 30%" in output


def _without_last_digits(value: Any) -> Any:
    """Other versions of numpy may differ in a number's last digits."""
    if isinstance(value, dict):
        return {k: _without_last_digits(v) for k, v in value.items()}
    return round(value, 6) if isinstance(value, float) else value
