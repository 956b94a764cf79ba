"""Configurations that are refused before any rank starts, and those that are only warned about."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_fipo.checks import check_evaluation, check_run
from megatron_fipo.config import Config
from tests.support.policies import make_config, make_task


@pytest.fixture
def task(tmp_path: Path) -> Path:
    return make_task(tmp_path / "base")


def _config(task: Path, **sections: dict[str, Any]) -> Config:
    data = {"train": str(task / "train.parquet"), "validation": str(task / "validation.parquet")}
    return make_config(task, **{**sections, "data": {**data, **sections.get("data", {})}})


def _edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_sound_run_passes_without_warnings(task: Path) -> None:
    """Checkpoint, tokenizer, data and two updates a step."""
    assert check_run(_config(task)) == []


def test_a_layout_that_the_model_allows_passes(task: Path) -> None:
    """TP 2 x PP 2 divides 4 heads, 2 key/value heads and 2 layers."""
    assert check_run(_config(task, parallel={"world_size": 4, "tensor": 2, "pipeline": 2})) == []


@pytest.mark.parametrize(("mini_batch", "epochs", "warned"), [(4, 1, True), (4, 2, False), (2, 1, False)])
def test_warns_where_fipo_is_a_no_op(task: Path, mini_batch: int, epochs: int, warned: bool) -> None:
    """With one update a step, and only then; the message says what to lower and its value."""
    trainer = {"mini_batch_prompts": mini_batch, "epochs_per_batch": epochs}
    warnings = check_run(_config(task, trainer=trainer))
    assert [("FIPO is exactly DAPO" in w, "(now 4 of 4 prompts)" in w) for w in warnings] == [(True, True)] * warned


def test_grpo_does_not_warn(task: Path) -> None:
    """One update a step is a choice there."""
    assert check_run(_config(task, trainer={"mini_batch_prompts": 4}, algorithm={"loss": "grpo"})) == []


def test_an_evaluation_needs_nothing_of_training(task: Path) -> None:
    """Neither its data nor a step that makes sense; what it judges with is checked as ever."""
    trainer = {"mini_batch_prompts": 4, "strict": True}
    check_evaluation(_config(task, data={"train": "elsewhere.parquet"}, trainer=trainer))
    with pytest.raises(ValueError, match=r"data file elsewhere.parquet does not exist"):
        check_evaluation(_config(task, data={"validation": "elsewhere.parquet"}))


def test_strict_refuses_a_no_op(task: Path) -> None:
    """`trainer.strict` makes the warning an error."""
    with pytest.raises(ValueError, match=r"trainer\.strict: with one update a step, FIPO is exactly DAPO"):
        check_run(_config(task, trainer={"mini_batch_prompts": 4, "strict": True}))


def test_everything_that_is_wrong_with_the_model_is_listed(task: Path) -> None:
    """Heads, layers and length in one message, each with its numbers."""
    config = _config(
        task,
        parallel={"world_size": 9, "tensor": 3, "pipeline": 3},
        rollout={"max_response_tokens": 1024},
        trainer={"tokens_per_micro_batch": 2048},
    )
    with pytest.raises(ValueError, match="does not fit the configuration") as error:
        check_run(config)
    assert str(error.value).splitlines()[1:] == [
        "  - 4 attention heads cannot be split over parallel.tensor 3: must be one of [1, 2, 4]",
        "  - 2 key/value heads cannot be split over parallel.tensor 3: must be one of [1, 2, 4]",
        "  - MLP width 256 must be a multiple of parallel.tensor 3",
        "  - 2 layers = 2 over 3 pipeline stages leaves a remainder of 2: set parallel.first_stage_layers / "
        "last_stage_layers so that the other stages are equal with at least one layer, or change parallel.pipeline",
        "  - data.max_prompt_tokens 64 + rollout.max_response_tokens 1024 = 1088 exceeds the model's "
        "max_position_embeddings 512; shorten them or set model.overrides.max_position_embeddings",
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gpt_neox"}, "'gpt_neox' of .* is not supported: must be one of .*qwen2"),
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"use_sliding_window": True, "sliding_window": 16}, "use_sliding_window"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rope type 'dynamic' is not supported",
        ),
    ],
)
def test_models_that_megatron_would_compute_differently(task: Path, changes: dict[str, Any], says: str) -> None:
    """Another model type, activation, attention or rope is refused by name."""
    _edit(task / "config.json", **changes)
    with pytest.raises(ValueError, match=says):
        check_run(_config(task))


def test_broken_model_config_is_named(task: Path) -> None:
    """A config.json that is no JSON."""
    (task / "config.json").write_text('{"model_type": "qwen2",')
    with pytest.raises(ValueError, match=r"config\.json"):
        check_run(_config(task))


def test_unknown_override_is_named(task: Path) -> None:
    """`model.overrides` replaces fields that exist, and no others."""
    with pytest.raises(ValueError, match=r"model\.overrides\.max_positions: the qwen2 config does not have this field"):
        check_run(_config(task, model={"overrides": {"max_positions": 4096}}))


def test_override_lengthens_the_context(task: Path) -> None:
    """The advice in the message about too long responses does help."""
    long = {"rollout": {"max_response_tokens": 1024}, "trainer": {"tokens_per_micro_batch": 2048}}
    assert check_run(_config(task, model={"overrides": {"max_position_embeddings": 2048}}, **long)) == []


@pytest.mark.parametrize(
    ("algorithm", "says"),
    [
        ({"half_life": 0.0}, "half_life"),
        ({"influence_clip": (1.2, 1.0)}, "influence_clip"),
        ({"clip_ratio_low": -0.1}, "clip_ratio_low"),
        ({"dual_clip": 0.5}, "dual_clip"),
    ],
)
def test_constants_of_the_loss(task: Path, algorithm: dict[str, Any], says: str) -> None:
    """The loss's own checks speak before any rank starts."""
    with pytest.raises(ValueError, match=says):
        check_run(_config(task, algorithm=algorithm))


def test_missing_tokenizer(task: Path) -> None:
    """A checkpoint without tokenizer files."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (task / name).unlink()
    with pytest.raises(ValueError, match="has no usable tokenizer"):
        check_run(_config(task))


def test_tokenizer_without_chat_template(task: Path) -> None:
    """Prompts go through the template, so its absence is found before ranks start."""
    (task / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        check_run(_config(task))


def test_tokenizer_larger_than_the_embedding(task: Path) -> None:
    """Both numbers are in the message."""
    _edit(task / "config.json", vocab_size=29)
    with pytest.raises(ValueError, match="has 30 tokens, but the model's embedding only 29 rows"):
        check_run(_config(task))


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _garble_footer(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-200] + b"\xff" * 192 + content[-8:])


def _no_parquet(file: Path) -> None:
    file.write_text("prompt,answer\n")


def _empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [_truncate, _garble_footer, _no_parquet, _empty])
@pytest.mark.parametrize("which", ["train", "validation"])
def test_damaged_data_file_is_named(task: Path, which: str, damage: Any) -> None:
    """Cut off, garbled, another format, or empty: both files are looked at."""
    damage(task / f"{which}.parquet")
    with pytest.raises(ValueError, match=rf"{which}\.parquet is not a parquet file"):
        check_run(_config(task))


def test_data_file_of_another_schema(task: Path) -> None:
    """The missing columns and those that are there."""
    pq.write_table(pa.table({"prompt": ["1+1?"], "answer": ["2"]}), task / "train.parquet")
    with pytest.raises(ValueError, match=r"lacks the column\(s\) reward_model; it has prompt, answer"):
        check_run(_config(task))


def test_directory_as_data_file(task: Path) -> None:
    """A directory is no data file."""
    with pytest.raises(ValueError, match="does not exist"):
        check_run(_config(task, data={"train": str(task)}))


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("dapoo", "'dapoo' must be one of dapo, math, exact, package.module:function"),
        ("no_such_package:score", "reward.function no_such_package:score: cannot be imported"),
        ("math:no_such_function", "reward.function math:no_such_function: cannot be imported"),
        ("math:pi", "must be a function, got float"),
    ],
)
def test_unknown_reward(task: Path, function: str, says: str) -> None:
    """A name that is none of ours, or a function that cannot be imported or called."""
    config = _config(task)
    config = dataclasses.replace(config, reward=dataclasses.replace(config.reward, function=function))
    with pytest.raises(ValueError, match=says):
        check_run(config)


def test_checks_leave_the_task_alone(task: Path) -> None:
    """Nothing is written beside the model and the data."""
    before = {f.name: f.stat().st_mtime_ns for f in task.iterdir()}
    check_run(_config(task))
    shutil.rmtree(task / "nothing", ignore_errors=True)
    assert {f.name: f.stat().st_mtime_ns for f in task.iterdir()} == before
