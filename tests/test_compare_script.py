"""examples/compare_fipo_dapo.sh: variants of several seeds, each trained once with its settings, in one report."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo.config import load_config
from tests.support.policies import make_task

ROOT = Path(__file__).parents[1]
SMALL = (
    *("trainer.max_steps=1", "rollout.prompts_per_step=4", "rollout.group_size=4", "trainer.mini_batch_prompts=2"),
    *(
        "rollout.max_response_tokens=40",
        "rollout.dynamic_sampling=false",
        "eval.max_problems=4",
        "parallel.threads_per_rank=1",
    ),
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A place with what the script needs: the recipe, a base model that knows nothing, and this environment."""
    (tmp_path / "examples").mkdir()
    for name in ("compare_fipo_dapo.sh", "quickstart.yaml"):
        shutil.copy(ROOT / "examples" / name, tmp_path / "examples")
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parents[1])
    make_task(tmp_path / "runs" / "quickstart-base")
    return tmp_path


def _compare(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`timeout` ends the script's runs with it."""
    command = ["timeout", "1200", str(checkout / "examples" / "compare_fipo_dapo.sh"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_every_variant_with_every_seed(checkout: Path) -> None:
    """Runs have their variant's settings, the report a line for each variant; a second call trains nothing again."""
    arguments = ("-s", "2", "-v", "dapo,placebo,no_filter", *SMALL)
    first = _compare(checkout, *arguments)
    assert first.returncode == 0, first.stderr
    runs = checkout / "runs" / "compare"
    names = [f"{variant}-seed{seed}" for seed in (1, 2) for variant in ("dapo", "placebo", "no_filter")]
    configs = {name: load_config(str(runs / name / "config.yaml")) for name in names}
    assert [config.run.seed for config in configs.values()] == [1, 1, 1, 2, 2, 2]
    assert [config.algorithm.loss for config in configs.values()] == ["grpo", "fipo", "fipo"] * 2
    assert [config.algorithm.influence for config in configs.values()] == ["fipo", "placebo", "fipo"] * 2
    assert [config.algorithm.dual_clip for config in configs.values()] == [10.0, 10.0, 1e8] * 2
    lines = [line.split() for line in first.stdout.splitlines()]
    of_two_runs = [line[0] for line in lines if line[1:3] == ["2", "1"]]  # and 1 step
    assert of_two_runs == ["dapo", "placebo", "no_filter"]
    assert (runs / "report.html").is_file()
    written = {path: path.stat().st_mtime_ns for path in runs.glob("*/metrics.jsonl")}
    again = _compare(checkout, *arguments)
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/metrics.jsonl")} == written
    assert len(written) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("-v", "fipo,gspo"), "no variant gspo"), (("-s", "0"), "-s 0 is no number"), (("-x",), "illegal option")],
)
def test_wrong_arguments(arguments: tuple[str, ...], message: str, checkout: Path) -> None:
    """They are refused before anything is trained."""
    refused = _compare(checkout, *arguments)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert not (checkout / "runs" / "compare").exists()
