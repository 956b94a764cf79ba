"""Which answers to a problem are the same: what a majority vote counts together."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Protocol, runtime_checkable

from megatron_fipo.reward.score import RewardFunction

_NUMBER = re.compile(r"[+-]?\d{1,40}(?:\.\d{1,40})?", re.ASCII)


@runtime_checkable
class ComparesAnswers(Protocol):
    """A reward function for which answers can be the same without being spelled the same."""

    def classes(self, answers: Sequence[Sequence[str]]) -> list[list[int]]:
        """For each problem's answers a number each: the same for answers that are equal."""


def answer_classes(reward: RewardFunction, answers: Sequence[Sequence[str]]) -> list[list[int]]:
    """For each problem's answers a number each, the same for answers that `reward` takes as equal; by default those
    that it gave in the same spelling, normalized or not."""
    if isinstance(reward, ComparesAnswers):
        return reward.classes(answers)
    return [group_equal(some, lambda one, other: False) for some in answers]


def group_equal(answers: Sequence[str], are_equal: Callable[[str, str], bool | None]) -> list[int]:
    """A number for each answer, the same for equal ones.

    Every different spelling is compared with one of each class so far, shorter spellings first, so that the result
    does not depend on the order of the answers where `are_equal` is not transitive. Plain numbers are told apart
    without it.

    Args:
        are_equal: None where it could not decide within its limits. Such an answer is a class of its own, and is not
            asked about again: otherwise one that takes for ever would cost a time limit for each of the others.
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
    """The class that an answer belongs to, None for a new one, and whether that one is to be compared with others."""
    value = _number(answer)
    if value is None and are_equal(answer, "0") is None:  # an easy question: it is this answer that takes for ever
        return None, False
    for number, example in examples:
        other = _number(example)
        same = value == other if value is not None and other is not None else are_equal(answer, example)
        if same:
            return number, True
    return None, True


def _number(answer: str) -> Fraction | None:
    return Fraction(answer) if _NUMBER.fullmatch(answer) else None
