"""Interface and result of reward functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

Failure: TypeAlias = Literal["timeout", "error"]  # why a verifier could not decide


@dataclass(frozen=True)
class Score:
    """Score of one response."""

    reward: float  # used to compute advantages
    accuracy: float  # 0 or 1: used by metrics and evaluation
    answer: str | None = None  # extracted answer (Cons@k votes with it); None: not found
    failure: Failure | None = None  # why the verifier could not decide; the response counts as incorrect


class RewardFunction(Protocol):
    """Reward function for a batch: the three sequences and the result have one entry per response."""

    def __call__(
        self, responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]
    ) -> list[Score]: ...

    def close(self) -> None:
        """Release processes and connections. The function is not called afterwards."""


@dataclass(frozen=True)
class PerResponse:
    """Reward function that scores each response separately and holds no resources."""

    score: Callable[[str, str], Score]  # (response, ground truth)

    def __call__(
        self, responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]
    ) -> list[Score]:
        return [self.score(response, truth) for response, truth in zip(responses, ground_truths, strict=True)]

    def close(self) -> None:
        pass


def binary_score(correct: bool, answer: str | None) -> Score:
    """Return the recipe's score: reward +1 or -1, accuracy 1 or 0."""
    return Score(reward=1.0 if correct else -1.0, accuracy=1.0 if correct else 0.0, answer=answer)
