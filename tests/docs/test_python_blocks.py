"""The Python blocks of the documentation run, and give the numbers that they should."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import megatron_fipo.trainer
from megatron_fipo.config import Config
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.trainer import Trainer
from tests.support.markdown import NAMES, ROOT, blocks
from tests.support.policies import make_config, make_task, save_tokenizer
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed
WITH_PYTHON = [page for page in NAMES if any(block.language == "python" for block in blocks(page))]


def _run_page(page: str, directory: str) -> dict[str, Any]:
    """Run a page's Python blocks in order, in one namespace, and return the numbers that they leave."""
    os.chdir(directory)
    sys.path.insert(0, directory)
    names: dict[str, Any] = {}
    for block in (b for b in blocks(page) if b.language == "python"):
        if file := re.match(r"# (\w+\.py)\n", block.text):
            Path(file[1]).write_text(block.text)
        else:
            exec(compile("\n" * block.line + block.text, page, "exec"), names)
    return {name: value for name, value in names.items() if isinstance(value, float | torch.Tensor)} | {
        "figures": _figures(names)
    }


def _figures(names: dict[str, Any]) -> dict[str, float]:
    out, timeline = names.get("out"), names.get("timeline")
    found = {}
    if out is not None:
        weights = out.influence_weights.tolist()
        found |= {f"influence_weight_{i}": weight for i, weight in enumerate(weights)}
    if timeline is not None:
        found |= {"step": timeline.step, "bubble": timeline.bubble_fraction, "over_ideal": timeline.idle_over_ideal}
    return found


def _train_a_step(config: Config, directory: str) -> None:
    sys.path.insert(0, directory)
    from uniform_engine import UniformEngine  # type: ignore[import-not-found]

    megatron_fipo.trainer.make_engine = lambda *_: UniformEngine(tokens=[3, 4, 5, 6])
    trainer = Trainer(config)
    try:
        trainer.train()
    finally:
        trainer.close()
        topologies.destroy()


def _in_a_process(page: str, directory: Path) -> dict[str, float]:
    # In a process of its own: a page may register a model family.
    return run_ranks(_without_group, 1, page, str(directory))[0]


def _without_group(page: str, directory: str) -> dict[str, float]:
    torch.distributed.destroy_process_group()
    try:
        return _run_page(page, directory)["figures"]
    finally:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def test_which_pages_have_python() -> None:
    """These; a new one is run below without further ado."""
    assert WITH_PYTHON == ["docs/extending.md", "docs/pipelines.md", "docs/scaling.md"]


def test_extending(tmp_path: Path) -> None:
    """Every example's own assertions hold; the library's weights are exp of the discounted shifts, clipped to 1.2."""
    save_tokenizer(tmp_path / "tiny-seed-oss")
    found = _in_a_process("docs/extending.md", tmp_path)
    decay = 2 ** (-1 / 32)
    shifts = [0.1 * sum(decay**k for k in range(n)) for n in (3, 2, 1, 2, 1)]
    expected = [min(math.exp(shift), 1.2) for shift in shifts]
    assert [found[f"influence_weight_{i}"] for i in range(5)] == pytest.approx(expected, rel=1e-5)


def test_a_step_with_the_engine_of_the_page(tmp_path: Path) -> None:
    """UniformEngine never ends a response, so all are truncated; its log-probabilities are not the trainer's."""
    text = next(b.text for b in blocks("docs/extending.md") if b.text.startswith("# uniform_engine.py\n"))
    (tmp_path / "uniform_engine.py").write_text(text)
    task = make_task(tmp_path / "task")
    config = make_config(
        task,
        run={"directory": str(tmp_path / "run")},
        data={"train": f"{task}/train.parquet", "max_prompt_tokens": 16},
        rollout={"max_response_tokens": 12, "dynamic_sampling": False},
        reward={"function": "tests.test_trainer:parity"},
        trainer={"max_steps": 1, "tokens_per_micro_batch": 64, "tensorboard": False, "export_policy": False},
    )
    run_ranks(_train_a_step, 1, config, str(tmp_path))
    (row,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["batch/response_length/min"] == row["batch/response_length/max"] == 12
    assert row["batch/truncated"] == 1
    assert row["policy/first_log_ratio_abs_max"] == 0
    assert row["policy/updates"] == 2
    assert row["mismatch/abs_mean"] > 0.1


def test_pipelines(capsys: pytest.CaptureFixture[str]) -> None:
    """The page shows the timelines that its program draws, and the idle shares that it prints."""
    page = (ROOT / "docs" / "pipelines.md").read_text()
    (block,) = (b.text for b in blocks("docs/pipelines.md") if b.language == "python")
    exec(compile(block, "pipelines", "exec"), {})
    *drawn, last = capsys.readouterr().out.splitlines()
    lines = [line for line in drawn if line.startswith("stage")]
    assert len(lines) == 12
    assert [line for line in lines if line not in page] == []
    assert [line for line in drawn if line not in lines] == ["43% idle", "27% idle", "16% idle"]
    shares = [f"{100 * float(share):.1f}%" for share in last.strip("[]").split()]
    one, interleaved, *chunked = shares
    sentence = f"{one} idle with 1F1B, {interleaved} interleaved (2 chunks of layers), and {', '.join(chunked)} with"
    assert sentence in page.replace("\n", " ")


def test_scaling(tmp_path: Path) -> None:
    """The idle share is what two chunks' passes leave of the step, more than equal micro-batches would: 3 / (8 * 2)."""
    found = _in_a_process("docs/scaling.md", tmp_path)
    busy = 2 * 3 * 1.31  # seconds: two chunks, forward and twice as long backward, the sum of all micro-batches
    assert found["bubble"] == pytest.approx(1 - busy / found["step"])
    assert found["over_ideal"] == pytest.approx(found["step"] / busy - 1)
    assert found["over_ideal"] > 3 / 16
