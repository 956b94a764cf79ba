"""A specification of two arms on a tiny task, and run directories with planted endpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from megatron_fipo.comparison.runs import PlannedRun, plan_runs, save_plan
from megatron_fipo.comparison.spec import Spec, read_spec
from megatron_fipo.config import to_yaml
from megatron_fipo.launch import attempts
from megatron_fipo.launch.attempts import Record

CONFIG = {
    "model": {"hf_path": "base", "dtype": "float32"},
    "data": {"train": "train.parquet", "validation": "validation.parquet", "max_prompt_tokens": 16},
    "rollout": {"prompts_per_step": 4, "group_size": 4, "max_response_tokens": 24},
    "reward": {"overlong_buffer_tokens": 0},
    "trainer": {"max_steps": 4, "mini_batch_prompts": 2, "tokens_per_micro_batch": 64},
    "eval": {"every": 2, "samples": 2},
}
SPEC = {
    "arms": {"F": {"algorithm.loss": "fipo"}, "D": {"algorithm.loss": "grpo"}},
    "pairs": [["F", "D"]],
    "seeds": 3,
    "endpoints": {"score": {"last": 2}, "length": {"last": 3}},
}


@pytest.fixture
def write_spec(tmp_path: Path) -> Callable[..., Path]:
    """write_spec(**changes): a legal specification in a file, with keys replaced, or removed by None."""

    def write(**changes: Any) -> Path:
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(CONFIG))
        content = {"config": str(config), "out": str(tmp_path / "out"), **SPEC, **changes}
        path = tmp_path / "comparison.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
        return path

    return write


@pytest.fixture
def planned(write_spec: Callable[..., Path]) -> tuple[Spec, list[PlannedRun]]:
    """The legal specification and its runs, whose configurations are written."""
    spec = read_spec(write_spec())
    runs = plan_runs(spec)
    save_plan(spec, runs)
    return spec, runs


def finish(run: PlannedRun, score: float, length: float, problems: tuple[float, ...] = ()) -> None:
    """Write what a finished run leaves: every step's length and every evaluation's score are the given ones."""
    steps, every = run.config.trainer.max_steps, run.config.eval.every
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "batch/response_length/mean": length, "policy/entropy": 1.0}
        if step % every == 0:
            row |= {"eval/avg@k": score, "time/eval": 1.0}
        rows.append(row)
    run.directory.mkdir(parents=True, exist_ok=True)
    (run.directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.directory / "config.yaml").write_text(to_yaml(run.config))
    (run.directory / "summary.json").write_text(json.dumps({"steps": steps, "before": None, "after": None}))
    record(run, "start")
    record(run, "finished")
    if problems:
        folder = run.directory / "evaluation"
        folder.mkdir(exist_ok=True)
        rows = [
            {"benchmark": "b", "problem": n, "prompt": [{"role": "user", "content": f"p{n}"}], "accuracy": a}
            for n, a in enumerate(problems)
        ]
        for step in range(every, steps + 1, every):
            pq.write_table(pa.Table.from_pylist(rows), folder / f"step_{step}.parquet")


def record(run: PlannedRun, event: str, kind: str = "", cause: str = "") -> None:
    """Append to the record of the run's attempts."""
    attempts.append(run.directory / "attempts.jsonl", Record(event, 1, kind=kind, cause=cause))  # type: ignore[arg-type]
