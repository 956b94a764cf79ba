"""Scores become rows: what groups are judged by, what is trained on, and what the verifier could not decide."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_fipo.algorithm import informative_groups
from megatron_fipo.batch import PER_SEQUENCE, Rollouts
from megatron_fipo.batching.step_batch import _response_metrics, response_rows
from megatron_fipo.data import Prompt
from megatron_fipo.reward import Score
from tests.batching.scoring import scorer
from tests.support.policies import make_config

CONFIG = make_config(
    "unused",
    rollout={"group_size": 2, "max_response_tokens": 8},
    reward={"overlong_buffer_tokens": 4},
)


def _scored(lengths: list[int], scores: list[Score]) -> Rollouts:
    rollouts = Rollouts.from_responses(
        ids=range(len(lengths)),
        prompts=[[1]] * len(lengths),
        responses=[[2] * n for n in lengths],
        log_probs=[[0.0] * n for n in lengths],
        truncated=[False] * len(lengths),
    )
    tokenizer: Any = SimpleNamespace(batch_decode=lambda tokens, **_: [""] * len(tokens))
    reward: Any = lambda texts, truths, sources: scores  # noqa: E731
    return scorer(CONFIG, reward, tokenizer, ())([Prompt(0, [], [1], "x", "y")] * len(scores), rollouts)


def test_groups_are_judged_without_the_penalty_for_length() -> None:
    """Two right responses of different lengths have different rewards, but nothing to learn from but the length."""
    rollouts = _scored([4, 8, 4, 8], [Score(1.0, 1.0), Score(1.0, 1.0), Score(0.2, 0.0), Score(0.9, 1.0)])
    assert rollouts.rewards.tolist() == pytest.approx([1.0, 0.0, 0.2, -0.1], abs=1e-6)
    assert rollouts.scores.tolist() == pytest.approx([1.0, 1.0, 0.2, 0.9])
    rows = response_rows(rollouts)
    found = informative_groups(rows[:, 5], rows[:, 0].long() // 2, rows[:, 2])
    assert found.informative.tolist() == [False, True]
    assert found.all_correct.tolist() == [True, False]


def test_failures_of_the_verifier_are_counted_apart() -> None:
    """Time-outs and errors of all generated responses, beside an accuracy that counts them as wrong."""
    failures = ("timeout", None, "error", "timeout")
    rows = response_rows(_scored([1] * 4, [Score(-1.0, 0.0, "x", failure) for failure in failures]))
    metrics = _response_metrics(rows)
    assert (metrics["reward/verifier_timeouts"], metrics["reward/verifier_errors"]) == (2.0, 1.0)
    assert metrics["reward/accuracy"] == 0.0


def test_responses_kept_by_older_versions() -> None:
    """Without scores and failures, a checkpoint's kept responses are judged by their accuracies."""
    rollouts = _scored([1, 2], [Score(1.0, 1.0), Score(-1.0, 0.0)])
    old = {name: value for name, value in vars(rollouts).items() if name not in ("scores", "failures")}
    restored = Rollouts.from_state_dict(old)
    assert restored.scores.tolist() == [1.0, 0.0]
    assert restored.failures.tolist() == [0, 0]
    same = Rollouts.from_state_dict(vars(rollouts))
    assert all(torch.equal(getattr(same, name), getattr(rollouts, name)) for name in PER_SEQUENCE)
