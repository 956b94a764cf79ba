"""What a rollout engine is asked and what it answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Temperature 0 is greedy; top_k 0 keeps all tokens."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """One response to draw. The same seed, prompt, weights and sampling give the same response."""

    prompt_ids: Sequence[int]
    seed: int


@dataclass(frozen=True)
class Response:
    """A sampled continuation.

    Attributes:
        token_ids: the stop token that ended it included.
        log_probs: of each token in the distribution it was drawn from: after temperature, top-k and top-p.
        truncated: it reached `max_tokens` without a stop token.
        unfinished: it was paused (`PausingEngine`) before either; it may have no token yet.
        weight_versions: numbers of the `load_weights` that drew it, in order; empty where an engine does not tell.
    """

    token_ids: list[int]
    log_probs: list[float]
    truncated: bool
    weight_versions: tuple[int, ...] = ()
    unfinished: bool = False


class RolloutEngine(Protocol):
    """
    Attributes:
        through_first_rank: requests of a data-parallel replica go through its first rank; otherwise each of its ranks
            generates a share.
    """

    through_first_rank: bool

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Take new weights by their Hugging Face names; every tensor is consumed before this returns.

        Collective over all ranks, since exporting weights is.
        """

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        """One response a request, in order.

        Raises:
            Interrupted: this rank was asked to stop (`parallel.interrupt`) before all were drawn.
        """

    def release(self) -> None:
        """Generation is over until the next `load_weights`: give back device memory that training needs."""

    def close(self) -> None:
        """Free what the engine holds."""


@runtime_checkable
class StreamingEngine(RolloutEngine, Protocol):
    """An engine that draws in the background, so that responses can be taken up one by one as they are finished.

    All requests of a replica go through its first rank.
    """

    def submit(self, request: Request, sampling: Sampling) -> Future[Response]:
        """One response, drawn sooner or later by the weights of the newest `load_weights`; returns at once.

        `Future.cancel` ends it at any time. There is none under way when `load_weights` is called.
        """


@runtime_checkable
class PausingEngine(StreamingEngine, Protocol):
    """One that can say how far a response has come."""

    def pause(self, futures: Sequence[Future[Response]]) -> None:
        """End these requests and return when they are ended; their results are what was drawn so far."""
