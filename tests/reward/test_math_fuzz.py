"""Random expressions against themselves rewritten, which are right, and against perturbed ones, which are wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_fipo.config import RewardConfig
from megatron_fipo.reward import RewardFunction, make_reward

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from expressions import Case, decimal_case, make_case


def _case(seed: int) -> Case:
    return decimal_case(seed) if seed % 10 == 9 else make_case(seed)


CASES = st.integers(0, 2**48).map(_case)


@pytest.fixture(scope="module")
def reward() -> Iterator[RewardFunction]:
    """Ten seconds are the recipes' limit for an answer; a busy machine gets more."""
    made = make_reward(RewardConfig(function="math", workers=2, timeout_seconds=60.0, batch_seconds=3600.0))
    yield made
    made.close()


def _check(reward: RewardFunction, cases: list[Case]) -> None:
    """All of them at once, and as they are judged in training: answer against ground truth."""
    responses = [rf"so \boxed{{{case.answer}}}" for case in cases]
    scores = reward(responses, [case.truth for case in cases], [""] * len(cases))
    judged = [(score.accuracy, score.failure) for score in scores]
    assert [
        (case, *found) for case, found in zip(cases, judged, strict=True) if found != (float(case.equal), None)
    ] == []


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(CASES, min_size=10, max_size=10))
def test_random_pairs(reward: RewardFunction, cases: list[Case]) -> None:
    """Sixty pairs, none misjudged, none undecided."""
    _check(reward, cases)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_random_pairs(reward: RewardFunction) -> None:
    """None misjudged, none undecided; with `--hypothesis-profile=search` ten thousand, six minutes of a core."""
    _check(reward, [_case(seed) for seed in range(2_000 if settings().derandomize else 10_000)])
