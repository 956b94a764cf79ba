"""Chat templates that write the date: a run or an evaluation goes on after midnight with the prompts it began with."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import Config
from megatron_fipo.evaluation import command, load_benchmarks
from megatron_fipo.evaluation.store import Store, settings_of
from megatron_fipo.model.stop_tokens import load_tokenizer
from megatron_fipo.run_log import RunLog, began, clear
from megatron_fipo.trainer import Trainer
from tests.support.policies import make_config, make_task
from tests.support.ranks import run_ranks

YESTERDAY = datetime(2026, 1, 1, 23, 59, 30)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """The quickstart's task with a template that writes a digit of the date before the problem."""
    made = make_task(tmp_path / "task")
    template = made / "chat_template.jinja"
    template.write_text("{{ strftime_now('%Y')[-1:] }}{{ strftime_now('%d')[-1:] }}" + template.read_text())
    return made


def _config(task: Path, **sections: dict[str, Any]) -> Config:
    data = {"train": str(task / "train.parquet"), "validation": str(task / "validation.parquet")}
    return make_config(task, data=data, eval={"samples": 2}, **sections)


def test_evaluation_goes_on_after_midnight(task: Path, tmp_path: Path) -> None:
    """Its directory has the time of its beginning; with that of now it would hold other problems."""
    config, store = _config(task), Store(tmp_path / "out")
    tokenizer = load_tokenizer(config.model.hf_path)
    store.claim(settings_of(config, load_benchmarks(config, tokenizer, YESTERDAY), YESTERDAY))
    assert store.began() == YESTERDAY
    command.check(config, tmp_path / "out")
    today = datetime(2027, 2, 3)
    with pytest.raises(ValueError, match="samples with other settings"):
        store.claim(settings_of(config, load_benchmarks(config, tokenizer, today), YESTERDAY))


def test_evaluations_of_older_versions_have_no_date(tmp_path: Path) -> None:
    """They go on with the present time, as they did."""
    store, before = Store(tmp_path), datetime.now()
    (tmp_path / "settings.json").write_text(json.dumps({"run.seed": 1}))
    assert store.began() >= before


def test_run_keeps_its_beginning(tmp_path: Path) -> None:
    """The first attempt's time stays; a run that starts over has a new one."""
    log = RunLog(make_config("unused", run={"directory": str(tmp_path)}), rank=0)
    log.keep_beginning(YESTERDAY)
    log.keep_beginning(datetime(2027, 2, 3))
    assert began(tmp_path) == YESTERDAY
    clear(tmp_path)
    before = datetime.now()
    assert began(tmp_path) >= before


def _first_prompt(config: Config, finish: bool) -> list[int]:
    trainer = Trainer(config)
    try:
        if finish:
            trainer.train()
        return list(trainer.prompts.prompts[0].token_ids)
    finally:
        trainer.close()


@pytest.mark.distributed
@pytest.mark.slow
def test_training_goes_on_after_midnight(task: Path, tmp_path: Path) -> None:
    """A run that began on another day is continued from its checkpoint, with the prompts of that day."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "began.json").write_text(json.dumps({"began": YESTERDAY.isoformat()}))
    sections = {
        "run": {"directory": str(run)},
        "reward": {"function": "tests.support.continued_runs:parity", "overlong_buffer_tokens": 0},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_response_tokens": 8, "max_rounds": 0},
    }
    first = _config(task, trainer={"max_steps": 1, "tensorboard": False}, **sections)
    (begun,) = run_ranks(_first_prompt, 1, first, True)
    second = _config(task, trainer={"max_steps": 2, "tensorboard": False}, **sections)
    (continued,) = run_ranks(_first_prompt, 1, second, True)
    assert begun == continued
    assert [json.loads(row)["step"] for row in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]
