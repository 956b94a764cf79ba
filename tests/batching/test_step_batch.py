"""Scores become rows: what groups are judged by, what is trained on, and what the verifier could not decide."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_fipo.algorithm import AcceptedGroups, informative_groups
from megatron_fipo.batch import PER_SEQUENCE, Rollouts
from megatron_fipo.batching.step_batch import batch_metrics, no_rollouts, response_rows, step_batch
from megatron_fipo.data import Prompt
from megatron_fipo.reward import Score
from tests.batching.scoring import scorer
from tests.support.policies import make_config
from tests.support.ranks import run_ranks

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
    accepted: AcceptedGroups[int] = AcceptedGroups([0], [], 1, 1, 0, 0)
    metrics = step_batch(accepted, no_rollouts(), rows, {}).metrics
    assert (metrics["generated/verifier_timeouts"], metrics["generated/verifier_errors"]) == (2.0, 1.0)
    assert metrics["generated/accuracy"] == 0.0


LENGTHS = [3, 17, 5, 9, 1, 8, 8, 2, 30, 4, 6]
REWARDS = [0.1, -1.0, 1.0, 0.7, -0.3, 1.0, -1.0, 0.2, -1.7, 1.0, 0.3]
CORRECT = [r > 0 for r in REWARDS]
TRUNCATED = [length > 8 for length in LENGTHS]


def _share(ids: list[int]) -> Rollouts:
    rollouts = Rollouts.from_responses(
        ids=ids,
        prompts=[[1]] * len(ids),
        responses=[[2] * LENGTHS[i] for i in ids],
        log_probs=[[0.0] * LENGTHS[i] for i in ids],
        truncated=[TRUNCATED[i] for i in ids],
    )
    rewards, accuracy = (torch.tensor([float(column[i]) for i in ids]) for column in (REWARDS, CORRECT))
    return rollouts.replace(rewards=rewards, accuracy=accuracy)


def _figures_of_the_batch(shares: list[list[int]]) -> dict[str, float]:
    topology: Any = SimpleNamespace(dp=dist.group.WORLD, device=torch.device("cpu"))
    return batch_metrics(_share(shares[dist.get_rank()]), 0, topology)


@pytest.mark.distributed
@pytest.mark.parametrize("shares", [[[*range(11)]], [[7, 1, 2, 10, 9, 4, 0], [8, 3, 6, 5]], [[], [*range(11)]]])
def test_figures_of_the_batch_are_exact_over_replicas(shares: list[list[int]]) -> None:
    """Quantiles and means are numpy's over all responses, whichever replica has them."""
    rewards = np.array(REWARDS, dtype=np.float32).astype(np.float64)
    lengths, correct = np.array(LENGTHS, dtype=np.float64), np.array(CORRECT)
    quantiles = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1])
    expected = {
        "batch/responses": 11.0,
        **{
            f"batch/response_length/{n}": q
            for n, q in zip(("min", "q25", "median", "q75", "max"), quantiles, strict=True)
        },
        "batch/response_length/mean": lengths.mean(),
        "batch/response_length/correct": lengths[correct].mean(),
        "batch/response_length/incorrect": lengths[~correct].mean(),
        "batch/accuracy": correct.mean(),
        "batch/truncated": np.mean(TRUNCATED),
    }
    for found in run_ranks(_figures_of_the_batch, len(shares), shares):
        assert {name: found[name] for name in expected} == expected
        assert found["batch/reward"] == pytest.approx(rewards.mean(), rel=1e-15)


def test_responses_kept_by_older_versions() -> None:
    """Without scores and failures, a checkpoint's kept responses are judged by their accuracies."""
    rollouts = _scored([1, 2], [Score(1.0, 1.0), Score(-1.0, 0.0)])
    old = {name: value for name, value in vars(rollouts).items() if name not in ("scores", "failures")}
    restored = Rollouts.from_state_dict(old)
    assert restored.scores.tolist() == [1.0, 0.0]
    assert restored.failures.tolist() == [0, 0]
    same = Rollouts.from_state_dict(vars(rollouts))
    assert all(torch.equal(getattr(same, name), getattr(rollouts, name)) for name in PER_SEQUENCE)
