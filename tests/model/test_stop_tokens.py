"""Where responses end: everything in a checkpoint that names a token for it, and none of them in what is judged."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fipo.batch import Rollouts
from megatron_fipo.batching.step_batch import score_responses
from megatron_fipo.evaluation.evaluate import _scored
from megatron_fipo.model.stop_tokens import declared_stop_tokens, stop_token_ids, without_stop_token
from megatron_fipo.reward import Score
from megatron_fipo.rollout import Response
from tests.support.policies import save_tokenizer


def _checkpoint(directory: Path, config: Any = None, generation: Any = None) -> Path:
    for name, eos in (("config.json", config), ("generation_config.json", generation)):
        if eos is not None:
            (directory / name).write_text(eos if isinstance(eos, str) else json.dumps({"eos_token_id": eos[0]}))
    return directory


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "expected"),
    [
        (([5, 6, 7],), None, 5, (5, 6, 7)),
        (([5, 6, 7],), None, None, (5, 6, 7)),
        (([5, 6],), (8,), 9, (5, 6, 8, 9)),
        ((5,), ([5, 6],), 5, (5, 6)),
        ((None,), ([6, 6],), 5, (5, 6)),
        ("{}", "{}", 5, (5,)),
        ((0,), None, 3, (0, 3)),
        (None, None, 0, (0,)),
    ],
)
def test_all_that_are_named(
    config: Any, generation: Any, tokenizer: int | None, expected: tuple[int, ...], tmp_path: Path
) -> None:
    """The union of config.json, generation_config.json and the tokenizer, whichever of them are there."""
    path = _checkpoint(tmp_path, config, generation)
    assert stop_token_ids(path, SimpleNamespace(eos_token_id=tokenizer)) == expected


def test_overrides_replace_the_config_s(tmp_path: Path) -> None:
    """model.overrides.eos_token_id stands in for config.json's field, and for no other file's."""
    path = _checkpoint(tmp_path, ([5, 6],), (8,))
    assert stop_token_ids(path, SimpleNamespace(eos_token_id=9), {"eos_token_id": [7]}) == (7, 8, 9)


@pytest.mark.parametrize(
    ("config", "generation", "message"),
    [
        ("{}", '{"eos_token_id": [5, 6', r"generation_config\.json cannot be read"),
        ("{}", "", r"generation_config\.json cannot be read"),
        ("{}", "[5]", r"generation_config\.json cannot be read: expected a JSON object"),
        ('{"eos_token_id": 5', "{}", r"/config\.json cannot be read"),
        (
            '{"eos_token_id": "5"}',
            "{}",
            r"eos_token_id of .*/config\.json must be a token id or a list of them, got '5'",
        ),
        ("{}", '{"eos_token_id": [5, null]}', r"eos_token_id of .*generation_config\.json must be .*, got \[5, None\]"),
        ("{}", '{"eos_token_id": -1}', "must be a token id or a list of them, got -1"),
        ("{}", '{"eos_token_id": true}', "must be a token id or a list of them, got True"),
        ("{}", '{"eos_token_id": 5.0}', "must be a token id or a list of them, got 5.0"),
    ],
)
def test_a_broken_file_is_an_error(config: str, generation: str, message: str, tmp_path: Path) -> None:
    """It may name tokens that nothing else does."""
    with pytest.raises(ValueError, match=message):
        stop_token_ids(_checkpoint(tmp_path, config, generation), SimpleNamespace(eos_token_id=5))


def test_no_end_at_all(tmp_path: Path) -> None:
    path = _checkpoint(tmp_path, (None,))
    assert declared_stop_tokens(path, None) == ()
    with pytest.raises(ValueError, match=r"has no end-of-sequence token \(eos_token_id\)"):
        stop_token_ids(path, SimpleNamespace(eos_token_id=None))


@pytest.mark.parametrize(
    ("tokens", "left"),
    [([1, 2, 9], [1, 2]), ([9], []), ([], []), ([1, 9, 2], [1, 9, 2]), ([1, 8, 9], [1, 8]), ([1, 2], [1, 2])],
)
def test_only_the_last_token_ends_a_response(tokens: list[int], left: list[int]) -> None:
    """A response that was cut at its length has none; what stands before the end stays."""
    assert without_stop_token(tokens, (8, 9)) == left


def test_what_ended_a_response_is_not_scored(tmp_path: Path) -> None:
    """Special or not: `12` ended by the digit 5, by the tokenizer's special token, and cut off at its length."""
    tokenizer = save_tokenizer(tmp_path)
    one, two, five = tokenizer.convert_tokens_to_ids(["1", "2", "5"])
    stops = (tokenizer.eos_token_id, five)
    responses = [[one, two, five], [one, two, tokenizer.eos_token_id], [one, two], [one, five, two]]
    judged: list[str] = []

    def reward(texts: list[str], truths: list[str], sources: list[str]) -> list[Score]:
        judged.extend(texts)
        return [Score(1.0, 1.0, None)] * len(texts)

    prompt = SimpleNamespace(ground_truth="12", data_source="x")
    rollouts = Rollouts.from_responses(range(4), [[1]] * 4, responses, [[0.0] * len(r) for r in responses], [False] * 4)
    score_responses(reward, tokenizer, [prompt] * 4, rollouts, stops)  # type: ignore[arg-type, list-item]
    drawn = [
        (SimpleNamespace(key=("b", 0, i), seed=0, prompt=prompt), Response(r, [0.0] * len(r), truncated=i >= 2))
        for i, r in enumerate(responses)
    ]
    samples = list(_scored(drawn, reward, tokenizer, stops))  # type: ignore[arg-type]
    plain = tokenizer.batch_decode([[one, two], [one, two], [one, two], [one, five, two]])
    assert judged == [*plain, *plain]
    assert [sample.response for sample in samples] == plain
    assert [sample.length for sample in samples] == [3, 3, 2, 3]  # the token counts, as the model has drawn it
