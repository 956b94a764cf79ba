"""What every reward function gives and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

Failure: TypeAlias = Literal["timeout", "error"]  # of a verifier, which could not decide


@dataclass(frozen=True)
class Score:
    """One response's verdict."""

    reward: float  # what the advantages are computed from
    accuracy: float  # 0 or 1: what metrics and evaluation count as right
    answer: str | None = None  # the extracted answer (Cons@k votes with it); None: none was found
    failure: Failure | None = None  # why the verifier could not decide; such a response counts as wrong


class RewardFunction(Protocol):
    """Scores a batch: the three sequences have one entry a response, and so has the result."""

    def __call__(
        self, responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]
    ) -> list[Score]: ...

    def close(self) -> None:
        """Give back what the function holds (processes, connections). It is not called afterwards."""


@dataclass(frozen=True)
class PerResponse:
    """A reward function that looks at one response at a time and holds nothing."""

    score: Callable[[str, str], Score]  # (response, ground truth)

    def __call__(
        self, responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]
    ) -> list[Score]:
        return [self.score(response, truth) for response, truth in zip(responses, ground_truths, strict=True)]

    def close(self) -> None:
        pass


def right_or_wrong(correct: bool, answer: str | None) -> Score:
    """The recipe's scale: +1 or -1, accuracy 1 or 0."""
    return Score(reward=1.0 if correct else -1.0, accuracy=1.0 if correct else 0.0, answer=answer)
