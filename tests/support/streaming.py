"""Streaming engines for tests: one that follows a script at a given pace, one that draws with a real model."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from megatron_fipo.parallel.interrupt import Interrupted
from megatron_fipo.rollout import HFEngine, Request, Response, Sampling, hf

TICK = 2e-4  # seconds
ORDERS: dict[str, Callable[[int], float]] = {
    "first": lambda place: place,
    "last": lambda place: -place,
    "mixed": lambda place: hash((place * 2654435761) % 997),
}


@dataclass(eq=False)
class _Serving:
    place: int  # in the order of submission
    request: Request
    rest: list[int]  # tokens to come
    start: int  # tokens that the response had before
    future: Future[Response]
    tokens: list[int] = field(default_factory=list)


class ScriptedStream:
    """At every tick, the `slots` requests that come first in `order` get their next token: short ones finish early.

    Args:
        script: tokens of the response that a request with this seed, after these tokens, is to have.
        stop: ends a response; one that does not end with it is truncated.
    """

    through_first_rank = True

    def __init__(
        self, script: Callable[[Request], tuple[list[int], int]], stop: int, order: str = "first", slots: int = 8
    ) -> None:
        self.script = script
        self.stop = stop
        self.order = ORDERS[order]
        self.slots = slots
        self.stalls: Callable[[Request, int], bool] = lambda request, tokens: False  # after this many, until paused
        self.version = 0
        self.submitted: list[Request] = []
        self.shared: tuple[int, int] | None = None  # this client and all clients, as it was last asked to share
        self.capacity = 1 << 20  # what it then says
        self._serving: list[_Serving] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def held_version(self) -> int:
        return self.version

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        assert not [s for s in self._serving if not s.future.cancelled()], "nothing may be under way"
        self.version += 1

    def submit(self, request: Request, sampling: Sampling) -> Future[Response]:
        tokens, start = self.script(request)
        assert len(tokens) <= sampling.max_tokens
        future: Future[Response] = Future()
        with self._lock:
            self._serving.append(_Serving(len(self.submitted), request, tokens, start, future))
            self.submitted.append(request)
        return future

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        return [future.result() for future in [self.submit(request, sampling) for request in requests]]

    def cancel(self, futures: Sequence[Future[Response]]) -> int:
        with self._lock:
            ended = [s for s in self._serving if s.future in futures]
            self._serving = [s for s in self._serving if s.future not in futures]
        for serving in ended:
            serving.future.cancel()
        return sum(len(serving.tokens) for serving in ended)

    def share_servers(self, client: int, clients: int) -> int:
        self.shared = client, clients
        return self.capacity

    def release(self) -> None:
        pass

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(TICK):
            done = []
            with self._lock:
                self._serving = [s for s in self._serving if not s.future.cancelled()]
                able = [s for s in self._serving if not self.stalls(s.request, len(s.tokens))]
                for serving in sorted(able, key=lambda s: self.order(s.place))[: self.slots]:
                    serving.tokens.append(serving.rest.pop(0))
                    if not serving.rest:
                        done.append(serving)
                        self._serving.remove(serving)
            for serving in done:
                self._answer(serving, unfinished=False)

    def _answer(self, serving: _Serving, unfinished: bool) -> None:
        log_probs = [-0.1 * (serving.start + k + 1) for k in range(len(serving.tokens))]
        truncated = not unfinished and serving.tokens[-1] != self.stop
        if serving.future.set_running_or_notify_cancel():
            serving.future.set_result(
                Response(serving.tokens, log_probs, truncated, (self.version,) * bool(serving.tokens), unfinished)
            )


class PausableStream(ScriptedStream):
    """The same, and responses can be paused."""

    def pause(self, futures: Sequence[Future[Response]]) -> None:
        with self._lock:
            paused = [s for s in self._serving if s.future in futures]
            self._serving = [s for s in self._serving if s.future not in futures]
        for serving in paused:
            self._answer(serving, unfinished=True)
        for future in futures:
            future.result()


class BackgroundHF:
    """A Hugging Face model that draws in a thread, as many requests at once as a group has, in the order of arrival, so
    that a response is the same to the bit whenever it is drawn."""

    through_first_rank = True

    def __init__(self, engine: HFEngine, group_size: int) -> None:
        self.engine = engine
        self.group_size = group_size
        self.version = 0
        self._waiting: deque[tuple[Request, Sampling, Future[Response]]] = deque()
        self._busy = threading.Lock()
        self._closed = threading.Event()
        # Like a server, it knows nothing of signals to the rank.
        hf.interrupt = SimpleNamespace(requested=lambda: False, Interrupted=Interrupted)  # type: ignore[assignment]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def held_version(self) -> int:
        return self.engine.held_version

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        with self._busy:  # what was cancelled may not have noticed yet
            self.engine.load_weights(weights)
            self.version += 1

    def submit(self, request: Request, sampling: Sampling) -> Future[Response]:
        future: Future[Response] = Future()
        self._waiting.append((request, sampling, future))
        return future

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        with self._busy:
            return self.engine.generate(requests, sampling)

    def cancel(self, futures: Sequence[Future[Response]]) -> int:
        for future in futures:
            future.cancel()
        return 0

    def share_servers(self, client: int, clients: int) -> int:
        return 4 * self.group_size

    def release(self) -> None:
        pass

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self.engine.close()

    def _run(self) -> None:
        torch.set_num_threads(1)
        while not self._closed.wait(1e-3):
            while len(self._waiting) >= self.group_size and not self._closed.is_set():
                self._draw([self._waiting.popleft() for _ in range(self.group_size)])

    def _draw(self, chunk: list[tuple[Request, Sampling, Future[Response]]]) -> None:
        with self._busy:
            if any(future.cancelled() for _, _, future in chunk):
                return
            responses = self.engine.generate([request for request, _, _ in chunk], chunk[0][1])
            version = self.version
        for (_, _, future), r in zip(chunk, responses, strict=True):
            if future.set_running_or_notify_cancel():
                future.set_result(Response(r.token_ids, r.log_probs, r.truncated, (version,)))
