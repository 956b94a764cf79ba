"""`megatron-fipo scaling plan`: files that appear whole, and exit code 2 for what the user can mend."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_fipo import cli

ROOT = Path(__file__).parents[3]
Command = Callable[..., tuple[Any, str, str]]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `megatron-fipo scaling plan ARGUMENTS` in this process: exit code, output, errors."""

    def run(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["megatron-fipo", "scaling", "plan", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code or 0, *capsys.readouterr()

    return run


def test_table_and_files(plan: Command, tmp_path: Path) -> None:
    """The table fits 100 columns; CSV has every layout, JSON the table's with parts that add up; no more is left."""
    code, out, _ = plan(
        *("--model", "qwen2.5-7b", "--gpus", "8", "--global-batch", "64", "--rows", "3", "--explain", "1"),
        *("--csv", str(tmp_path / "all.csv"), "--json", str(tmp_path / "top.json")),
    )
    assert code == 0
    assert max(map(len, out.splitlines())) <= 100
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    layouts = json.loads((tmp_path / "top.json").read_text())["layouts"]
    assert f"{len(rows)} layouts fit" in out
    assert [float(row["seconds"]) for row in rows[:3]] == [x["seconds"] for x in layouts]
    for x in layouts:
        assert x["tensor"] * x["pipeline"] * x["context"] * x["data"] == 8
        assert all(sum(stage.values()) == pytest.approx(x["seconds"]) for stage in x["stages"])
        assert sum(x["memory"].values()) / 1e9 == pytest.approx(x["memory_gb"])
    assert sorted(f.name for f in tmp_path.iterdir()) == ["all.csv", "top.json"]


def test_recipe_is_judged(plan: Command) -> None:
    """A config's own layout is compared with the fastest, and explained."""
    code, out, _ = plan(str(ROOT / "examples" / "fipo_32b.yaml"), "--rows", "2", "--explain", "0")
    assert code == 0
    assert "the config's own TP8 PP2 DP8" in out
    assert "slower than the fastest" in out
    assert "LM head and log-probabilities" in out


def test_recipe_that_cannot_fit_is_told(plan: Command) -> None:
    """The plan says what is short during rollouts, with the setting that would do."""
    recipe = str(ROOT / "examples" / "fipo_32b.yaml")
    code, out, _ = plan(recipe, "rollout.server.gpu_memory_utilization=0.99", "--rows", "1")
    assert code == 0
    assert "problem: during rollouts, stage 0 keeps 4.2 GB beside the engine's 84.2" in out
    assert "set it to 0.93" in out


def test_lengths_of_a_runs_rollouts(plan: Command, tmp_path: Path) -> None:
    """Responses by their tokens, prompts by their characters."""
    table = pa.table({"prompt": ["x" * 35, "x" * 70], "response_tokens": [[1] * 90, [1] * 480]})
    pq.write_table(table, tmp_path / "step_1.parquet")
    arguments = ("--model", "qwen2.5-0.5b", "--gpus", "1", "--global-batch", "2")
    code, _, err = plan(*arguments, "--rollouts", str(tmp_path / "step_1.parquet"), "--max-tokens", "499")
    assert code == 2
    assert "must be at least the longest sequence, 500 tokens" in err
    assert plan(*arguments, "--rollouts", str(tmp_path / "step_1.parquet"), "--max-tokens", "500")[0] == 0


def test_scaling_on_paper(plan: Command) -> None:
    """One row for each number of GPUs."""
    code, out, _ = plan("--model", "qwen2.5-0.5b", "--gpus", "8,16", "--scale", "strong", "--global-batch", "64")
    assert code == 0
    assert "100.0%" in out


def test_a_calibration_replaces_what_is_known(plan: Command, tmp_path: Path) -> None:
    """Half of the bandwidth inside the node: the same layouts, the best not faster."""
    (tmp_path / "measured.json").write_text(json.dumps({"gpus": {"H100-80": {"link": 100e9}}}))
    seconds = []
    for more in ((), ("--calibration", str(tmp_path / "measured.json"))):
        file = tmp_path / "out.json"
        plan("--model", "qwen2.5-32b", "--gpus", "16", "--rows", "1", "--json", str(file), *more)
        seconds.append(json.loads(file.read_text())["layouts"][0]["seconds"])
    assert seconds[1] > seconds[0]


BAD = {
    "nothing to plan": ([], "needs either a CONFIG.yaml or --model"),
    "both": (
        [str(ROOT / "examples" / "fipo_32b.yaml"), "--model", "qwen2.5-7b"],
        "needs either a CONFIG.yaml or --model",
    ),
    "model": (["--model", "qwen9"], "nor a known name"),
    "gpu": (["--model", "qwen2.5-7b", "--gpu", "H1000"], "GPU 'H1000' is unknown: use one of H100-80"),
    "gpus": (["--model", "qwen2.5-7b", "--gpus", "eight"], "--gpus 'eight' must be numbers"),
    "no gpus": (["--model", "qwen2.5-7b", "--gpus", "0"], "--gpus '0' must be positive"),
    "lengths": (["--model", "qwen2.5-7b", "--lengths", "p90=5,p50=9"], "their tokens at least 1 and increasing"),
    "rollouts": (["--model", "qwen2.5-7b", "--rollouts", "no.parquet"], "--rollouts no.parquet does not exist"),
    "budget": (
        ["--model", "qwen2.5-7b", "--max-tokens", "100"],
        "--max-tokens 100 must be at least the longest sequence, 4096",
    ),
    "recompute": (["--model", "qwen2.5-7b", "--recompute", "some"], "must be none, full, or none,full"),
    "precision": (["--model", "qwen2.5-7b", "--precision", "float4"], "H100-80 has no rate for float4"),
    "scale": (["--model", "qwen2.5-7b", "--scale", "up"], "must be strong or weak"),
    "explain": (["--model", "qwen2.5-0.5b", "--gpus", "1", "--explain", "9999"], "--explain 9999: must be at most"),
    "calibration": (["--model", "qwen2.5-7b", "--calibration", "no.yaml"], "calibration no.yaml does not exist"),
    "directory": (["--model", "qwen2.5-0.5b", "--gpus", "1", "--csv", "no/where.csv"], "cannot write"),
    "batch": (["--model", "qwen2.5-7b", "--global-batch", "-1"], "--global-batch -1 must be at least 1"),
    "prime": (["--model", "qwen2.5-7b", "--gpus", "97", "--global-batch", "8"], "no legal layout on 97 GPUs"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_the_users(plan: Command, name: str) -> None:
    """Exit code 2 and one sentence that says what to change."""
    arguments, message = BAD[name]
    code, _, err = plan(*arguments)
    assert code == 2
    assert message in err
