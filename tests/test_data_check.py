"""`megatron-fipo data check`, and what is refused or warned of before any rank starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from megatron_fipo.checks import check_run
from megatron_fipo.cli import main
from megatron_fipo.config import Config, to_yaml
from megatron_fipo.data_check import show
from tests.support.policies import make_config, make_task


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("task"))


def _config(task: Path, **sections: dict[str, Any]) -> Config:
    data = {"train": str(task / "train.parquet"), **sections.pop("data", {})}
    return make_config(task, data=data, **sections)


def _with_template(task: Path, directory: Path, template: str) -> Path:
    """A copy of the task's checkpoint with another chat template."""
    directory.mkdir()
    for file in task.iterdir():
        if file.name != "chat_template.jinja":
            (directory / file.name).symlink_to(file)
    (directory / "train.parquet").unlink()
    (directory / "train.parquet").write_bytes((task / "train.parquet").read_bytes())
    (directory / "chat_template.jinja").write_text(template)
    return directory


def test_shows_text_tokens_stops_and_verdicts(task: Path) -> None:
    """Each prompt's text is what its tokens decode to; the truth is right, another value and nothing are wrong."""
    lines = list(show(_config(task, reward={"function": "exact"})))
    tokenizer = AutoTokenizer.from_pretrained(task)
    assert lines[0].startswith(f"{task / 'train.parquet'}: 32 rows")
    assert lines[1] == (f"a response ends with {tokenizer.eos_token!r} ({tokenizer.eos_token_id}), or after 128 tokens")
    first = pq.read_table(task / "train.parquet").to_pylist()[0]
    ids = tokenizer.apply_chat_template(first["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert lines[3] == repr(tokenizer.decode(ids))
    assert [int(part.split(":")[0]) for part in lines[4].removeprefix("tokens: ").split(" ")] == ids
    truth = first["reward_model"]["ground_truth"]
    assert lines[5] == f"correct answer 'Answer: {truth}': reward 1, accuracy 1, answer '{truth}'"
    assert lines[6] == "incorrect answer 'Answer: -987654321': reward -1, accuracy 0, answer '-987654321'"
    assert lines[7] == "empty answer '': reward -1, accuracy 0, answer None"
    assert [line.split(",")[0] for line in lines if line.startswith("\nrow")] == ["\nrow 0", "\nrow 16", "\nrow 31"]


def test_warns_of_ground_truths_that_are_never_right(task: Path, tmp_path: Path) -> None:
    """`dapo` cuts an answer at its line's end: a ground truth of two lines cannot be given."""
    rows = pq.read_table(task / "train.parquet").to_pylist()[:1]
    rows[0]["reward_model"]["ground_truth"] = "1\n2"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    lines = list(show(_config(task, data={"train": str(tmp_path / "p.parquet")}, reward={"function": "dapo"})))
    assert "scores the ground truth itself as incorrect in row(s) 0" in lines[-1]


def _run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["megatron-fipo", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.parametrize("command", [["train"], ["train", "--dry-run"], ["data", "check"]])
def test_templates_that_refuse_end_with_code_2(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    """Before any rank starts, with the row and the template's words, and without a traceback."""
    model = _with_template(task, tmp_path / "model", "{{ raise_exception('only system messages here') }}")
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(_config(model, run={"directory": str(tmp_path / "run")})))
    monkeypatch.setattr("megatron_fipo.launch.run", lambda *_, **__: pytest.fail("ranks were started"))
    assert _run_cli(monkeypatch, *command, str(file)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "train.parquet, row 0: the chat template of" in error
    assert "only system messages here" in error
    assert "Traceback" not in error


def test_command_prints_what_the_model_sees(
    task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`data check CONFIG` with an override and a number of prompts."""
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(_config(task)))
    assert _run_cli(monkeypatch, "data", "check", "--prompts", "1", str(file), "reward.function=exact") == 0
    output = capsys.readouterr().out
    assert output.count("the model sees:") == 1
    assert output.count("\ncorrect answer") == 1


def test_unused_added_tokens_are_warned_of(task: Path, tmp_path: Path) -> None:
    """Added tokens beyond the embedding are harmless while no prompt has one; a prompt that has one is refused."""
    model = _with_template(task, tmp_path / "model", (task / "chat_template.jinja").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    tokenizer = AutoTokenizer.from_pretrained(task)
    rows = json.loads((task / "config.json").read_text())["vocab_size"]
    added = [f"<unused{i}>" for i in range(rows - len(tokenizer) + 2)]
    tokenizer.add_tokens(added)
    (model / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(model)
    warnings = check_run(_config(model))
    assert any(f"has {rows + 2} tokens, but the model's embedding only {rows} rows" in w for w in warnings)
    problem = pq.read_table(task / "train.parquet").to_pylist()[0]
    problem["prompt"][0]["content"] += added[-1]
    pq.write_table(pa.Table.from_pylist([problem]), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=rf"row 0, has the added token {rows + 1} \('<unused"):
        check_run(_config(model, data={"train": str(tmp_path / "p.parquet")}))
