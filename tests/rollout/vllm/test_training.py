"""Whole runs with real vLLM servers on the CPU, by the command: they learn as with the embedded engine, whatever the
number of servers and whether or not batches are drawn ahead, and go on where they were interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[3]
STEPS = 8
SETTINGS = (
    *("parallel.world_size=1", "parallel.tensor=1", "parallel.pipeline=1", f"trainer.max_steps={STEPS}"),
    *("rollout.prompts_per_step=16", "trainer.mini_batch_prompts=4", "optimizer.lr=3e-4", "eval.every=0"),
    *("trainer.export_policy=false", "trainer.tensorboard=false"),
)
SERVER = ("kv_cache_gb=0.125", "max_num_seqs=64", "verify_weights=1")
VLLM = ("rollout.engine=vllm", *(f"rollout.server.{setting}" for setting in SERVER))
VARIANTS: dict[str, Sequence[str]] = {
    "hf": (),
    "one server": VLLM,
    "two servers": (*VLLM, "rollout.server.count=2"),
    "one step behind": (*VLLM, "rollout.max_staleness=1"),
    "continued responses": (*VLLM, "rollout.max_staleness=2", "rollout.partial=true"),
}


class Run(NamedTuple):
    directory: Path

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]

    def summary(self) -> dict[str, Any]:
        return json.loads((self.directory / "summary.json").read_text())

    def responses(self, step: int) -> list[dict[str, Any]]:
        return pq.read_table(self.directory / "rollouts" / f"step_{step}.parquet").to_pylist()

    def tokens(self) -> list[list[tuple[int, list[int]]]]:
        return [[(r["id"], r["response_tokens"]) for r in self.responses(step + 1)] for step in range(STEPS)]


def command(run: Path, base: Path, *overrides: str) -> list[str]:
    places = (f"run.directory={run}", f"model.hf_path={base}")
    quickstart = str(ROOT / "examples" / "quickstart.yaml")
    return [sys.executable, "-m", "megatron_fipo.cli", "train", quickstart, *places, *SETTINGS, *overrides]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's base model and task."""
    out = tmp_path_factory.mktemp("quickstart") / "base"
    make = [sys.executable, str(ROOT / "examples" / "quickstart" / "make_task.py"), "--out", str(out)]
    subprocess.run([*make, "--validation-problems", "64"], check=True, capture_output=True, timeout=600)
    return out


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs each variant once."""

    @cache
    def train(variant: str) -> Run:
        run = tmp_path_factory.mktemp("runs") / variant.replace(" ", "-")
        ended = subprocess.run(
            command(run, base, *VARIANTS[variant]), capture_output=True, text=True, timeout=900, check=False
        )
        assert ended.returncode == 0, ended.stderr[-4000:]
        return Run(run)

    return train


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "hf"])
def test_learns(trained: Any, variant: str) -> None:
    """Avg@8 rises as much as with the embedded engine, but for the noise of 64 problems; log-probabilities agree."""
    expected, found = trained("hf").summary(), trained(variant).summary()
    assert found["before"]["avg@k"] == pytest.approx(expected["before"]["avg@k"], abs=0.03)
    gain, reference = (s["after"]["avg@k"] - s["before"]["avg@k"] for s in (found, expected))
    assert reference > 0.1
    assert gain > reference - 0.1
    for row in trained(variant).rows():
        if not row["batch/staleness_max"]:
            assert row["mismatch/abs_max"] < 1e-4


def test_number_of_servers_changes_nothing(trained: Any) -> None:
    """Two servers draw the responses that one draws, in every step."""
    assert trained("two servers").tokens() == trained("one server").tokens()


@pytest.mark.parametrize(("variant", "oldest"), [("one step behind", 1), ("continued responses", 2)])
def test_staleness(trained: Any, variant: str, oldest: int) -> None:
    """Tokens are as old as allowed and no older, and their own weights are on record."""
    ages = {
        step - 1 - version
        for step in range(1, STEPS + 1)
        for response in trained(variant).responses(step)
        for version in response["weight_versions"]
    }
    assert 1 <= max(ages) <= oldest
    assert max(row["batch/staleness_max"] for row in trained(variant).rows()) == max(ages)


def test_goes_on(trained: Any, base: Path, tmp_path: Path) -> None:
    """Told to stop, a run ends its servers; started again, it draws and learns what it would have."""
    run, uninterrupted = Run(tmp_path / "run"), trained("one server")
    arguments = command(run.directory, base, *VARIANTS["one server"])
    first = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 600
        while not (run.directory / "metrics.jsonl").exists() or len(run.rows()) < 3:
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(first.pid, signal.SIGUSR1)
        assert first.wait(timeout=300) == 75
    finally:
        first.kill()
        first.wait()
    assert not subprocess.run(["pgrep", "-f", str(run.directory)], capture_output=True, check=False).stdout
    subprocess.run(arguments, check=True, capture_output=True, timeout=900)
    assert run.tokens() == uninterrupted.tokens()
    for found, expected in zip(run.rows(), uninterrupted.rows(), strict=True):
        assert found["policy/loss"] == pytest.approx(expected["policy/loss"], abs=1e-5)
