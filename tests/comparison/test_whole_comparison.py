"""`megatron-fipo compare` as it is used: two arms and two seeds, interrupted, continued, and reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_fipo.exit_codes import RUN_AGAIN
from tests.support.policies import make_task
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
SECONDS = 1500  # of one command, on a busy machine


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    """A specification of runs of two steps, on a base model that knows nothing."""
    task = make_task(tmp_path / "base")
    config = {
        "model": {"hf_path": str(task), "dtype": "float32"},
        "parallel": {"threads_per_rank": 1},
        "data": {"train": f"{task}/train.parquet", "validation": f"{task}/validation.parquet", "max_prompt_tokens": 16},
        "rollout": {
            "prompts_per_step": 4,
            "group_size": 2,
            "max_response_tokens": 12,
            "dynamic_sampling": False,
        },
        "reward": {"overlong_buffer_tokens": 4},
        "optimizer": {"lr": 1e-3, "warmup": 0},
        "trainer": {
            "max_steps": 2,
            "mini_batch_prompts": 2,
            "tokens_per_micro_batch": 64,
            "tensorboard": False,
            "export_policy": False,
        },
        "eval": {"every": 1, "samples": 2, "max_problems": 3},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    content = {
        "config": str(tmp_path / "config.yaml"),
        "out": str(tmp_path / "out"),
        "arms": {"F": {"algorithm.loss": "fipo"}, "D": {"algorithm.loss": "grpo"}},
        "pairs": [["F", "D"]],
        "seeds": 2,
        "endpoints": {"score": {"last": 2}, "length": {"last": 2}},
    }
    path = tmp_path / "comparison.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@contextmanager
def _compare(spec: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command; when the block is left, neither it nor a process that it started is alive."""
    process = subprocess.Popen(
        [sys.executable, "-m", "megatron_fipo.cli", "compare", str(spec), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            for one in [psutil.Process(process.pid), *children]:
                one.kill()
        process.communicate()


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.slow  # five trainings, each with the start of its ranks: a minute
def test_interrupted_comparison_continues(spec: Path) -> None:
    """Asked to stop in its second run it ends with 75; the same command keeps the first run and trains the rest."""
    out = spec.parent / "out"
    with _compare(spec) as process:
        wait_until(lambda: (out / "D-seed1" / "attempts.jsonl").exists() or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == RUN_AGAIN, text
    assert "the same command continues" in text
    kept = (out / "F-seed1" / "metrics.jsonl").stat().st_mtime_ns
    assert not (out / "comparison.json").exists()
    with _compare(spec, "--jobs", "2") as process:
        text, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, text
    assert (out / "F-seed1" / "metrics.jsonl").stat().st_mtime_ns == kept
    content = json.loads((out / "comparison.json").read_text())
    assert [run["status"] for run in content["runs"]] == ["finished"] * 4
    assert [(one["endpoint"], len(one["differences"])) for one in content["comparisons"]] == [
        ("score", 2),
        ("length", 2),
    ]
    for run in content["runs"]:
        rows = [json.loads(line) for line in (out / f"{run['arm']}-seed{run['seed']}" / "metrics.jsonl").open()]
        assert run["score"] == pytest.approx(sum(row["eval/avg@k"] for row in rows) / 2)
    # The base model has no informative answers but in length, and both arms sample the same responses at first.
    first = [json.loads((out / name / "metrics.jsonl").open().readline()) for name in ("F-seed1", "D-seed1", "F-seed2")]
    lengths = [row["batch/response_length/mean"] for row in first]
    assert lengths[0] == lengths[1] != lengths[2]
    assert "length, F - D" in text
    with _compare(spec, "--report-only") as process:
        assert "length, F - D" in process.communicate(timeout=SECONDS)[0]
