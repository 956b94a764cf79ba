"""Which answers vote together: by spelling, by mathematics, and with answers that take for ever."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from megatron_fipo.config import RewardConfig
from megatron_fipo.reward import RewardFunction, make_reward
from megatron_fipo.reward.equivalence import answer_classes, group_equal

TIMEOUT = 4.0


@pytest.fixture(scope="module")
def math() -> Iterator[RewardFunction]:
    verifier = make_reward(RewardConfig(function="math", workers=2, timeout_seconds=TIMEOUT))
    yield verifier
    verifier.close()


def _partition(classes: Sequence[int]) -> set[frozenset[int]]:
    return {frozenset(i for i, c in enumerate(classes) if c == number) for number in classes}


def _sets(*parts: Sequence[int]) -> set[frozenset[int]]:
    return {frozenset(part) for part in parts}


def test_by_spelling() -> None:
    """The other verifiers compare texts, and so does the vote."""
    (classes,) = answer_classes(make_reward(RewardConfig(function="dapo")), [["1", "0.5", "1", "1/2"]])
    assert _partition(classes) == _sets([0, 2], [1], [3])


def test_by_mathematics(math: RewardFunction) -> None:
    """Forms of one half are one class, numbers are told apart by value, and every problem is its own."""
    problems = [["1/2", "0.5", r"\frac{1}{2}", "2", "0.50", "x"], ["7", "7.0", r"\{1,2\}", r"\{2,1\}", "[1,2)"], []]
    halves, numbers, none = answer_classes(math, problems)
    assert _partition(halves) == _sets([0, 1, 2, 4], [3], [5])
    assert _partition(numbers) == _sets([0, 1], [2, 3], [4])
    assert none == []


@pytest.mark.slow
def test_runaway_answers_are_classes_of_their_own(math: RewardFunction) -> None:
    """Each costs one time limit, and none keeps the others from being compared."""
    answers = [r"\frac{3}{4}", r"10^{10^{10}}", "0.75", r"9^{9^{9^{9}}}", "75/100", "9" * 5000]
    started = time.monotonic()
    (classes,) = answer_classes(math, [answers])
    assert time.monotonic() - started < 15 * TIMEOUT
    assert _partition(classes) == _sets([0, 2, 4], [1], [3], [5])


def _counting(
    are_equal: Callable[[str, str], bool | None],
) -> tuple[Callable[[str, str], bool | None], list[tuple[str, str]]]:
    asked: list[tuple[str, str]] = []

    def ask(one: str, other: str) -> bool | None:
        asked.append((one, other))
        return are_equal(one, other)

    return ask, asked


def test_order_does_not_matter() -> None:
    """Where a = b and b = c but not a = c, the same answers go together in any order."""

    def near(one: str, other: str) -> bool:
        return abs(ord(one) - ord(other)) <= 1

    found = {frozenset(zip(p, group_equal(p, near), strict=True)) for p in itertools.permutations("abcd")}
    assert len(found) == 1


def test_undecidable_answers_are_asked_about_once() -> None:
    """One that takes for ever is compared with an easy number and with nothing else."""
    ask, asked = _counting(lambda one, other: None if "!" in one + other else one[0] == other[0])
    assert _partition(group_equal(["!", "a1", "5!", "a2"], ask)) == _sets([0], [1, 3], [2])
    assert [pair for pair in asked if "!" in pair[0] + pair[1]] == [("!", "0"), ("5!", "0")]


def test_numbers_are_not_asked_about() -> None:
    """AIME's answers are integers: nothing goes to the verifier."""
    ask, asked = _counting(lambda one, other: False)
    assert _partition(group_equal(["12", "012", "+12.0", "13", "-12"], ask)) == _sets([0, 1, 2], [3], [4])
    assert asked == []
