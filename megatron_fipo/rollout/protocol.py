"""Protocol of rollout engines: requests, sampling parameters, responses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Temperature 0 is greedy; top_k 0 keeps all tokens."""

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """Request for one response. The same seed, prompt, weights and sampling give the same response."""

    prompt_ids: Sequence[int]
    seed: int


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed from any numbers and names, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


@dataclass(frozen=True)
class Response:
    """A sampled response.

    Attributes:
        token_ids: the stop token that ended it included.
        log_probs: of each token in the distribution it was sampled from: after temperature, top-k and top-p.
        truncated: it reached `max_tokens` without a stop token.
        unfinished: it was paused (`PausingEngine`) before either; it may have no token yet.
        weight_versions: numbers of the `load_weights` that it was sampled with, in order; empty: not known.
        routing: `[inputs, layers, experts of a token]` int8 or int16, the experts that each token of prompt and
            response but the last was computed with; None where they were not asked for (`moe.routing_replay`).
    """

    token_ids: list[int]
    log_probs: list[float]
    truncated: bool
    weight_versions: tuple[int, ...] = ()
    unfinished: bool = False
    routing: torch.Tensor | None = field(default=None, compare=False)


class RolloutEngine(Protocol):
    """Engine that samples responses with the policy's weights.

    Attributes:
        through_first_rank: requests of a data-parallel replica go through its first rank; otherwise each of its ranks
            generates a share.
        held_version: number of the newest `load_weights`, counted from 1, while the engine samples with its weights;
            0: it has none, or not everywhere, and needs them again. May differ between ranks.
    """

    through_first_rank: bool

    @property
    def held_version(self) -> int: ...

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Take new weights by their Hugging Face names; every tensor is consumed before this returns.

        Collective over all ranks, since exporting weights is.
        """

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        """Return one response a request, in order.

        Raises:
            Interrupted: this rank was asked to stop (`parallel.interrupt`) before all were sampled.
        """

    def release(self) -> None:
        """Give back device memory that training needs, until the next `load_weights`."""

    def close(self) -> None:
        """Close the engine."""


@runtime_checkable
class StreamingEngine(RolloutEngine, Protocol):
    """Engine that samples in the background, so that responses can be processed as they are finished.

    All requests of a replica go through its first rank.
    """

    def submit(self, request: Request, sampling: Sampling) -> Future[Response]:
        """Request one response with the weights of the newest `load_weights`; return at once.

        `Future.cancel` ends it at any time. None is in flight when `load_weights` is called.
        """

    def cancel(self, futures: Sequence[Future[Response]]) -> int:
        """End these requests; return how many tokens their responses had, estimated where the engine does not know."""

    def share_servers(self, client: int, clients: int) -> int:
        """Take this client's share of the servers' capacity from now on, as one of several that use it equally.

        Returns:
            The number of its requests that are sampled at a time; further ones wait.

        Args:
            client: index of this one.
            clients: ranks that send requests at the same time.
        """


@runtime_checkable
class PausingEngine(StreamingEngine, Protocol):
    """Engine that can return partial responses."""

    def pause(self, futures: Sequence[Future[Response]]) -> None:
        """End these requests and return when they are ended; their results are the partial responses."""
