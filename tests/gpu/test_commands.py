"""On a GPU: every command and benchmark once, at toy size, as a user calls it.

They are started side by side when the first result is asked for: most of their time goes into imports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.world import needs_gpu
from tests.support.policies import make_task

pytestmark = [*needs_gpu, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
GPU_NAME = "H100-80"  # any that the planner knows


def _call(*arguments: object) -> str:
    """Return the standard output of a command that succeeds; packages come from where this test's do."""
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert ended.returncode == 0, f"{arguments}:\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
    return ended.stdout


def _cli(*arguments: object) -> str:
    return _call("-m", "megatron_fipo.cli", *arguments)


def _benchmark(script: str, *arguments: object) -> dict[str, Any]:
    return json.loads(_call(ROOT / "benchmarks" / script, *arguments).splitlines()[-1])


class _Jobs:
    """The commands that are run, by job; each job has a directory of its own."""

    def __init__(self, model: Path, directory: Path) -> None:
        self.model, self.directory = model, directory
        self.settings = [
            *(f"model.hf_path={model}", f"data.train={model}/train.parquet"),
            *(f"data.validation={model}/validation.parquet", "rollout.dynamic_sampling=false"),
            *(
                "parallel.world_size=1",
                "parallel.tensor=1",
                "parallel.pipeline=1",
                "eval.samples=2",
                "eval.pass_k=null",
            ),
            *("rollout.prompts_per_step=8", "rollout.prompts_per_round=8", "trainer.mini_batch_prompts=4"),
            *("rollout.group_size=4", "rollout.max_response_tokens=32", "checkpoint.every=1"),
        ]

    def train(self) -> dict[str, Any]:
        """Two steps, the second of them after a resumption; then what is done with such a run."""
        run = self.directory / "run"
        for steps in (1, 2):
            given = (*self.settings, f"run.directory={run}", f"trainer.max_steps={steps}")
            _cli("train", "examples/quickstart.yaml", *given)
        checkpoint = run / "checkpoints" / "step_2"
        evaluated = _cli("eval", "examples/quickstart.yaml", f"checkpoint={checkpoint}", *self.settings)
        _cli("convert", "to-hf", "--megatron", checkpoint, "--out", self.directory / "hf", "--config", self.model)
        return {"run": run, "evaluated": json.loads(evaluated.splitlines()[-1]), "report": _cli("report", run)}

    def dry_run(self) -> str:
        return _cli("train", "examples/quickstart.yaml", *self.settings, "--dry-run")

    def convert(self) -> str:
        out = self.directory / "megatron"
        _cli("convert", "to-megatron", "--hf", self.model, "--out", out)
        return _cli("convert", "verify", "--hf", self.model, "--megatron", out, "--logits", "1+1=")

    def mismatch(self) -> dict[str, Any]:
        """Engine and trainer layer by layer, in the dtype of runs on GPUs."""
        out = self.directory / "mismatch.json"
        _cli("mismatch", "examples/quickstart.yaml", *self.settings, "model.dtype=bfloat16", "--out", out)
        return json.loads(out.read_text())

    def scaling_run(self) -> list[dict[str, Any]]:
        out = self.directory / "scaling"
        given = ("--out", out, "--steps", "2", "--warmup", "1", "--lengths", "40")
        _cli("scaling", "run", "examples/quickstart.yaml", *self.settings, *given)
        _cli("scaling", "report", out)
        return [json.loads(path.read_text()) for path in (out / "rows").glob("*.json")]

    def calibrate(self) -> str:
        out = self.directory / "calibration.yaml"
        _cli("scaling", "calibrate", "--out", out, "--minutes", "0.2", "--gpu", GPU_NAME)
        return _cli("scaling", "plan", "--model", "qwen2.5-1.5b", "--gpus", "1", "--calibration", out)

    def doctor(self) -> str:
        return _cli("doctor")

    def gpu(self) -> dict[str, Any]:
        parts = ("loss", "head", "update", "deterministic")
        return _benchmark("gpu.py", "--toy", "--device", "cuda", "--directory", self.directory, "--parts", *parts)

    def future_kl(self) -> dict[str, Any]:
        return _benchmark(
            "future_kl.py", "--device", "cuda", "--sizes", "1x20480", "--seconds", "0.1", "--skip-published"
        )

    def train_step(self) -> dict[str, Any]:
        return _benchmark("train_step.py", "--dtype", "bfloat16", "--pairs", "2")

    def lm_head(self) -> dict[str, Any]:
        given = ("--tokens", "2048", "--compare-tokens", "512", "--vocab", "8192", "--rounds", "2")
        return _benchmark("lm_head.py", "--device", "cuda", "--dtype", "bfloat16", *given)

    def checkpoint(self) -> dict[str, Any]:
        return _benchmark("checkpoint.py", "--size", "tiny", "--rounds", "1", "--directory", self.directory)


JOBS = [name for name in vars(_Jobs) if not name.startswith("_")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """Return a function that gives a job's result, or raises its error."""
    model = make_task(tmp_path_factory.mktemp("task"))
    with ThreadPoolExecutor(min(6, os.cpu_count() or 1)) as pool:
        futures: dict[str, Future[Any]] = {
            name: pool.submit(getattr(_Jobs(model, tmp_path_factory.mktemp(name)), name)) for name in JOBS
        }
        yield lambda name: futures[name].result()
        for future in futures.values():
            future.cancel()


def test_train(results: Any) -> None:
    """Two steps are on record, with a page; every first log-ratio is 0, and engine and trainer agree."""
    run = results("train")["run"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["policy/first_log_ratio_abs_max"] == 0 for row in rows)
    assert all(row["mismatch/abs_mean"] < 0.05 for row in rows)
    assert (run / "report.html").stat().st_size > 10_000


def test_eval_and_report(results: Any) -> None:
    """The run's newest checkpoint is evaluated; the run has a report."""
    assert 0 <= results("train")["evaluated"]["avg@k"] <= 1
    assert "report.html" in results("train")["report"]


def test_dry_run(results: Any) -> None:
    """One update, whose first log-ratio is 0."""
    assert "dry run passed" in results("dry_run")
    assert "first log-ratio 0" in results("dry_run")


def test_convert(results: Any) -> None:
    """There and back the same model bit for bit, and the same logits."""
    assert "the checkpoints are the same model" in results("convert")


def test_mismatch(results: Any) -> None:
    """No component of a healthy trainer differs from the engine's model by more than rounding."""
    report = results("mismatch")
    assert report["first"] is None
    assert report["dtype"] == "bfloat16"
    assert report["components"][1]["rounding"] > 0
    assert len(report["responses"]) == 4


def test_scaling_run(results: Any) -> None:
    """A measured layout."""
    (row,) = results("scaling_run")
    assert row["status"] == "ok"
    assert row["seconds"] > 0


def test_calibrate_and_plan(results: Any) -> None:
    """A plan with what was measured."""
    assert "qwen2.5-1.5b" in results("calibrate").lower()


def test_doctor(results: Any) -> None:
    """It sees the GPU."""
    assert torch.cuda.get_device_name(0) in results("doctor")


@pytest.mark.parametrize("name", ["gpu", "future_kl", "train_step", "lm_head", "checkpoint"])
def test_benchmark(results: Any, name: str) -> None:
    """Its last line has figures; the update's first log-ratio is 0."""
    figures = results(name)
    assert len(figures) > 5
    assert figures.get("te_off_first_log_ratio_abs_max", 0) == 0


def test_deterministic_benchmark(results: Any) -> None:
    """The same update twice gave the same bits with run.deterministic."""
    assert results("gpu")["update_deterministic_same_bits"]
