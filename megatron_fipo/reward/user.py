"""A reward function of the user's, named `package.module:function` and checked at every call."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from megatron_fipo.reward.score import Score


class UserReward:
    """Calls `function(responses, ground_truths, data_sources)`, which returns one `Score` or number a response.

    A number is the reward; a positive one counts as accuracy 1.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._function = _import(path)

    def __call__(
        self, responses: Sequence[str], ground_truths: Sequence[str], data_sources: Sequence[str]
    ) -> list[Score]:
        results = list(self._function(responses, ground_truths, data_sources))
        if len(results) != len(responses):
            raise ValueError(
                f"reward function {self._path} returned {len(results)} results for {len(responses)} responses"
            )
        return [self._checked(i, result) for i, result in enumerate(results)]

    def close(self) -> None:
        """Calls the function's own `close()`, where it has one."""
        close = getattr(self._function, "close", None)
        if close is not None:
            close()

    def _checked(self, i: int, result: Any) -> Score:
        try:
            score = result if isinstance(result, Score) else _from_number(float(result))
        except (TypeError, ValueError):
            raise ValueError(
                f"reward function {self._path} returned {result!r} for response {i}: neither a number nor a Score"
            ) from None
        if not math.isfinite(score.reward):
            raise ValueError(f"reward function {self._path} returned reward {score.reward} for response {i}")
        if score.accuracy not in (0.0, 1.0):
            raise ValueError(
                f"reward function {self._path} returned accuracy {score.accuracy} for response {i}; it is 0 or 1"
            )
        return score


def _from_number(reward: float) -> Score:
    return Score(reward=reward, accuracy=1.0 if reward > 0 else 0.0)


def _import(path: str) -> Callable[..., Any]:
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reward.function {path}: cannot import it ({error})") from error
    if not callable(function):
        raise ValueError(f"reward.function {path} is a {type(function).__name__}, not a function")
    return function
