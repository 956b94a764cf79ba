"""User-defined reward function, named `package.module:function` and validated at every call."""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from megatron_fipo.reward.score import Score

logger = logging.getLogger(__name__)

DEFAULT_THRESHOLD = 0.5


class UserReward:
    """Call `function(responses, ground_truths, data_sources)`, which returns a `Score` or number per response.

    A number is the reward. It counts as correct from `accuracy_threshold` on; None: from 0.5 on, with a warning at the
    first number other than 0, 1 and -1.
    """

    def __init__(self, path: str, accuracy_threshold: float | None = None) -> None:
        self._path = path
        self._threshold = accuracy_threshold
        self._warned = accuracy_threshold is not None
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
        """Call the function's own `close()`, if it has one."""
        close = getattr(self._function, "close", None)
        if close is not None:
            close()

    def _checked(self, i: int, result: Any) -> Score:
        try:
            score = result if isinstance(result, Score) else self._from_number(float(result))
        except (TypeError, ValueError):
            raise ValueError(
                f"reward function {self._path} returned {result!r} for response {i}: must be a number or a Score"
            ) from None
        if not math.isfinite(score.reward):
            raise ValueError(f"reward function {self._path} returned reward {score.reward} for response {i}")
        if score.accuracy not in (0.0, 1.0):
            raise ValueError(
                f"reward function {self._path} returned accuracy {score.accuracy} for response {i}: must be 0 or 1"
            )
        return score

    def _from_number(self, reward: float) -> Score:
        threshold = DEFAULT_THRESHOLD if self._threshold is None else self._threshold
        if not self._warned and math.isfinite(reward) and reward not in (-1.0, 0.0, 1.0):
            self._warned = True
            if os.environ.get("RANK", "0") == "0":  # once, not on every rank
                logger.warning(
                    "reward function %s returned %g. Such rewards are used unchanged in training; accuracy, Avg@k and "
                    "pass@k count values of at least %g as correct. Set reward.accuracy_threshold, or return "
                    "Score(reward, accuracy)",
                    *(self._path, reward, threshold),
                )
        return Score(reward=reward, accuracy=1.0 if reward >= threshold else 0.0)


def _import(path: str) -> Callable[..., Any]:
    module_name, _, name = path.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reward.function {path}: cannot be imported ({error})") from error
    if not callable(function):
        raise ValueError(f"reward.function {path} must be a function, got {type(function).__name__}")
    return function
