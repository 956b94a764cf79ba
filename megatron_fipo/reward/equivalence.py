"""Equivalence classes of answers to a problem, as counted by a majority vote."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Protocol, runtime_checkable

from megatron_fipo.reward.score import RewardFunction

_NUMBER = re.compile(r"[+-]?\d{1,40}(?:\.\d{1,40})?", re.ASCII)


@runtime_checkable
class ComparesAnswers(Protocol):
    """Reward function that treats different spellings of an answer as equal."""

    def classes(self, answers: Sequence[Sequence[str]]) -> list[list[int]]:
        """Return a class index for each answer of each problem; equal answers have equal indices."""


def answer_classes(reward: RewardFunction, answers: Sequence[Sequence[str]]) -> list[list[int]]:
    """Return a class index for each answer of each problem, equal for answers that `reward` treats as equal.

    By default these are answers with the same spelling, normalized or not.
    """
    if isinstance(reward, ComparesAnswers):
        return reward.classes(answers)
    return [group_equal(some, lambda one, other: False) for some in answers]


def group_equal(answers: Sequence[str], are_equal: Callable[[str, str], bool | None]) -> list[int]:
    """Return a class index for each answer, equal for equal answers.

    Each distinct spelling is compared with one of each class so far, shorter spellings first, so that the result
    does not depend on the order of the answers where `are_equal` is not transitive. Plain numbers are compared
    directly.

    Args:
        are_equal: returns None if it could not decide within its limits. Such an answer gets its own class and is not
            compared again: otherwise a slow answer would cost a time limit for each of the others.
    """
    found: dict[str, int] = {}
    examples: list[tuple[int, str]] = []  # of each class that others may join
    for answer in sorted(set(answers), key=lambda a: (len(a), a)):
        number, open_to_others = _class_of(answer, examples, are_equal)
        found[answer] = len(found) if number is None else number
        if number is None and open_to_others:
            examples.append((found[answer], answer))
    return [found[answer] for answer in answers]


def _class_of(
    answer: str, examples: Sequence[tuple[int, str]], are_equal: Callable[[str, str], bool | None]
) -> tuple[int | None, bool]:
    """Return an answer's class, None for a new one, and whether the new class is comparable."""
    value = _number(answer)
    if value is None and are_equal(answer, "0") is None:  # an easy comparison: this answer itself exceeds the limits
        return None, False
    for number, example in examples:
        other = _number(example)
        same = value == other if value is not None and other is not None else are_equal(answer, example)
        if same:
            return number, True
    return None, True


def _number(answer: str) -> Fraction | None:
    return Fraction(answer) if _NUMBER.fullmatch(answer) else None
