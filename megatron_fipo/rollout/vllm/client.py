"""Client of several vLLM servers: requests are balanced and retried, and each gets exactly one response.

One thread runs an event loop with a task for each request and one for each server. A request goes to the least
loaded server, and is retried, on another one if there is any, when its server is lost, fails, hangs, or answers with
weights other than the current ones. An earlier attempt is ended before the next one starts, so none is answered twice;
and where requests carry their seeds, a retry samples the same response.

Requests wait here, not in a server: clients share what a server runs at a time (`share_servers`). So a response is
begun when it is sent, and its deadline does not depend on how many are before it.

`submit` is the core: a future for each request, which can be cancelled, or paused for its partial response, at any
time.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import httpx

from megatron_fipo.exit_codes import MachineFailure
from megatron_fipo.machine import limits
from megatron_fipo.rollout.protocol import Request, Response, Sampling
from megatron_fipo.rollout.vllm.answer import Fault, Refused, Stale, engine_names, nothing_yet, payload, read
from megatron_fipo.rollout.vllm.client_state import (
    PendingRequest,
    ServerState,
    connection_pool,
    preferred,
    share_of_capacity,
    tokens_so_far,
)
from megatron_fipo.rollout.vllm.control import explain
from megatron_fipo.rollout.vllm.served_model import ANY_MODEL, ServedModel

_MOST_ATTEMPTS = 8  # of one request; more would not help: the servers are not the cause
_ABORT_SECONDS = 0.2  # between abort orders: a server ignores one for a request that it has not read yet


@dataclass(frozen=True)
class ClientTimeouts:
    """Client timeouts in seconds, except for `strikes`.

    Attributes:
        deadline: for one attempt at a response, from the moment it is sent.
        wait: for any server to be usable, before requests fail.
        probe: between two probes of a server in use, and for its answer.
        strikes: failed probes after which a server counts as hung.
        first, longest: pauses between probes of a server that is not in use; they double.
    """

    deadline: float
    wait: float
    probe: float = 20.0
    strikes: int = 3
    first: float = 0.2
    longest: float = 5.0


class _Lost(Exception):
    """The connection was lost, or the server counted as hung, during an attempt."""


class _OutOfFiles(Exception):
    """This process can open no more connections, which is not the server's fault."""


class Client:
    """Requests to all of a run's servers from this process; usable from any thread.

    Args:
        urls, keys: of all servers.
        concurrency: responses that a server runs at the same time, for all clients together.
        connections: requests in flight at the same time, to all servers together; None: as many as this process may
            open files. Further ones are queued.
        seeded: send the requests' seeds.
        model: that they serve.
        on_hung: called with the number of a hung server, in the client's thread; must return at once.
    """

    def __init__(
        self,
        urls: Sequence[str],
        keys: Sequence[str],
        timeouts: ClientTimeouts,
        concurrency: int,
        on_hung: Callable[[int], None] = lambda number: None,
        seeded: bool = True,
        model: ServedModel = ANY_MODEL,
        connections: int | None = None,
    ) -> None:
        self._seeded = seeded
        self._model = model
        self._timeouts = timeouts
        self._concurrency = concurrency
        self._client, self._clients = 0, 1  # index of this one among those that share the servers
        self._on_hung = on_hung
        # A pool for each server: a pool searches all of its connections whenever a request starts or ends.
        context = httpx.create_ssl_context()  # reads certificates, once
        self._servers = [
            ServerState(number, url, connection_pool(url, key, concurrency, context))
            for number, (url, key) in enumerate(zip(urls, keys, strict=True))
        ]
        self._waiting: deque[PendingRequest] = deque()
        self._pending: WeakKeyDictionary[Future[Response], PendingRequest] = WeakKeyDictionary()
        self._version: str | None = None
        self._usable_since = time.monotonic()  # the last time that any server was
        self._connections = connections or limits.connections_at_most(len(urls))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="vllm-client", daemon=True)
        self._thread.start()

    def expect(self, version: str | None, usable: Sequence[bool] = ()) -> None:
        """Accept only responses of these weights from now on. None: use no server until the next call."""
        asyncio.run_coroutine_threadsafe(self._expect(version, usable), self._loop).result()

    def submit(self, request: Request, sampling: Sampling) -> Future[Response]:
        """Return a future of one response.

        The future's exception is ValueError for a request that servers refuse (also for a wrong key), RuntimeError if
        no server can be used for `timeouts.wait` seconds or all attempts failed.
        """
        pending = PendingRequest(len(request.prompt_ids) + sampling.max_tokens, sampling.max_tokens)
        future = asyncio.run_coroutine_threadsafe(self._respond(pending, request, sampling), self._loop)
        self._pending[future] = pending
        return future

    def cancel(self, futures: Sequence[Future[Response]]) -> int:
        """End these requests; return how many tokens their responses had.

        Servers do not tell: it is estimated from the time since they were sent, and the speed of finished responses.
        """
        return asyncio.run_coroutine_threadsafe(self._cancel(futures), self._loop).result()

    def share_servers(self, client: int, clients: int) -> int:
        """Send each server only a share of the requests that it runs at a time, as one of several equal clients.

        Returns:
            The number of requests that all servers together take from this client.
        """
        return asyncio.run_coroutine_threadsafe(self._share_servers(client, clients), self._loop).result()

    def pause(self, futures: Sequence[Future[Response]]) -> None:
        """End these requests and return when they have ended; their results are the partial responses, maybe empty."""
        asyncio.run_coroutine_threadsafe(self._pause(futures), self._loop).result()
        wait(futures)

    def close(self) -> None:
        """Cancel all requests in flight."""
        if self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result(timeout=30)
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        for server in self._servers:
            self._loop.create_task(self._watch(server))
        self._loop.run_forever()
        self._loop.close()

    async def _shut_down(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self._servers:
            await server.http.aclose()

    async def _expect(self, version: str | None, usable: Sequence[bool]) -> None:
        self._version = version
        self._usable_since = time.monotonic()
        for server in self._servers:
            server.usable = version is not None and usable[server.number]
            server.strikes, server.pause = 0, 0.0
            server.probe_now.set()
        self._dispatch()

    async def _share_servers(self, client: int, clients: int) -> int:
        self._client, self._clients = client, clients
        self._dispatch()
        return sum(share_of_capacity(self._servers, self._concurrency, client, clients).values())

    async def _cancel(self, futures: Sequence[Future[Response]]) -> int:
        now, speeds = time.monotonic(), [s.speed for s in self._servers if s.speed is not None]
        tokens = sum(tokens_so_far(self._pending[future], speeds, now) for future in futures)
        for future in futures:
            future.cancel()
        return tokens

    # A request

    async def _respond(self, pending: PendingRequest, request: Request, sampling: Sampling) -> Response:
        body = payload(request, sampling, pending.name, self._seeded)
        problem = ""
        for _ in range(_MOST_ATTEMPTS):
            async with self._some_server(pending) as server:
                if server is None:
                    return nothing_yet()
                try:
                    answer = await self._attempt(server, body)
                    response = read(answer, request, sampling, self._version, pending.paused, self._model)
                    server.pause = 0.0
                    server.note_speed(len(response.token_ids) / (time.monotonic() - pending.sent_at))
                    return response
                except Refused as error:
                    raise ValueError(f"{server.url} refuses a request: {error}") from None
                except TimeoutError:
                    seconds = f"{self._timeouts.deadline:g}"
                    problem = f"by {server.url}: no response within rollout.server.request_timeout_seconds={seconds}"
                    pending.avoid.add(server.number)
                except _OutOfFiles:
                    problem = f"for {server.url}: {_out_of_files()}"
                    self._connections = max(1, min(self._connections, self._busy - 1))
                    await asyncio.sleep(self._timeouts.first)
                except (_Lost, Fault, Stale) as error:
                    problem = f"by {server.url}: {type(error).__name__.lower().removeprefix('_')}: {error}"
                    pending.avoid.add(server.number)
                    self._set_aside(server)
        raise RuntimeError(f"a request failed in {_MOST_ATTEMPTS} attempts; the last one, {problem}")

    @contextlib.asynccontextmanager
    async def _some_server(self, pending: PendingRequest) -> AsyncIterator[ServerState | None]:
        """Return the usable server with the fewest outstanding tokens, once one has capacity; None when paused."""
        if pending.paused:
            yield None
            return
        pending.waiting = self._loop.create_future()
        self._waiting.append(pending)
        self._dispatch()
        try:
            server = await pending.waiting
            pending.sent_at = time.monotonic()
            yield server
        finally:
            server, pending.waiting = pending.server, None
            if server is not None:
                server.busy -= 1
                server.outstanding -= pending.tokens
                self._dispatch()

    async def _attempt(self, server: ServerState, body: dict[str, object]) -> httpx.Response:
        """Send one request.

        Raises:
            Fault, Refused: the server answered with an error.
            TimeoutError: it did not answer in time.
            _Lost: the connection was lost.
            _OutOfFiles: this process cannot open the connection.
        """
        attempt = self._loop.create_task(server.http.post("/inference/v1/generate", json=body))
        server.attempts.add(attempt)
        try:
            async with asyncio.timeout(self._timeouts.deadline):
                answer = await asyncio.shield(attempt)
        except httpx.TransportError as error:
            if limits.is_out_of_files(error):
                raise _OutOfFiles from None
            raise _Lost(f"{type(error).__name__} {error}".rstrip()) from None
        except asyncio.CancelledError:
            if attempt.cancelled():  # by `_give_up`, not by the request's owner
                raise _Lost("it no longer answers") from None
            raise
        finally:
            server.attempts.discard(attempt)
            attempt.cancel()
            with contextlib.suppress(asyncio.CancelledError, httpx.HTTPError):
                await attempt  # its connection is closed: the server ends its work
        if answer.status_code in (408, 429) or answer.status_code >= 500:
            raise Fault(explain(answer))
        if answer.status_code != 200:
            raise Refused(explain(answer))
        return answer

    async def _pause(self, futures: Sequence[Future[Response]]) -> None:
        pending_requests = {future: self._pending[future] for future in futures}
        for pending in pending_requests.values():
            pending.paused = True
            if pending.waiting is not None and not pending.waiting.done():
                pending.waiting.set_result(None)
        while left := [pending for future, pending in pending_requests.items() if not future.done()]:
            names: dict[ServerState, list[str]] = defaultdict(list)
            for pending in left:
                if pending.server is not None:
                    names[pending.server].append(pending.name)
            await asyncio.gather(*(self._abort(server, theirs) for server, theirs in names.items()))
            await asyncio.sleep(_ABORT_SECONDS if names else 0)

    async def _abort(self, server: ServerState, names: Sequence[str]) -> None:
        """Make the server answer these requests with their partial responses; `_watch` detects a lost server."""
        body = {"request_ids": engine_names(names)}
        with contextlib.suppress(httpx.HTTPError):
            await server.http.post("/inference/v1/abort_requests", json=body, timeout=self._timeouts.probe)

    # Servers

    def _dispatch(self) -> None:
        """Dispatch waiting requests, in order, while servers have capacity."""
        usable = [s for s in self._servers if s.usable]
        shares = share_of_capacity(usable, self._concurrency, self._client, self._clients)
        index = 0
        while (
            index < len(self._waiting)
            and self._busy < self._connections
            and (free := [s for s in usable if s.busy < (1 if s.pause else max(1, shares[s]))])  # 1: after a failure
        ):
            pending = self._waiting[index]
            if pending.waiting is None or pending.waiting.done():  # cancelled or paused
                del self._waiting[index]
                continue
            fitting = [s for s in preferred(usable, shares, pending.avoid) if s in free]
            if not fitting:
                index += 1
                continue
            del self._waiting[index]
            server = min(fitting, key=lambda s: s.outstanding)
            server.busy += 1
            server.outstanding += pending.tokens
            pending.waiting.set_result(server)

    @property
    def _busy(self) -> int:
        return sum(server.busy for server in self._servers)

    def _set_aside(self, server: ServerState) -> None:
        """Stop using a server until a probe finds the current weights; intervals between probes double."""
        server.usable = False
        self._probe_later(server)
        server.probe_now.set()

    def _probe_later(self, server: ServerState) -> None:
        server.pause = min(max(2 * server.pause, self._timeouts.first), self._timeouts.longest)

    async def _watch(self, server: ServerState) -> None:
        while True:
            if server.usable:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(server.probe_now.wait(), self._timeouts.probe)
            else:
                await asyncio.sleep(server.pause or self._timeouts.first)
            server.probe_now.clear()
            if self._version is not None:
                await self._probe(server)
                self._fail_if_none_usable()

    async def _probe(self, server: ServerState) -> None:
        """Query its weight version: the answer comes from its engine, not from the API process."""
        try:
            answer = await server.http.get("/weight_info", timeout=self._timeouts.probe)
            found = answer.raise_for_status().json()["weight_version"]
        except (httpx.HTTPError, ValueError, LookupError) as error:
            if limits.is_out_of_files(error):
                return
            server.strikes += 1  # its engine may have died while its API process runs
            self._probe_later(server)
            if server.strikes >= self._timeouts.strikes:
                self._give_up(server)
            return
        server.strikes = 0
        server.usable = found == self._version
        if server.usable:
            self._dispatch()
        else:
            self._probe_later(server)

    def _give_up(self, server: ServerState) -> None:
        server.usable, server.strikes = False, 0
        for attempt in server.attempts:
            attempt.cancel()
        self._on_hung(server.number)

    def _fail_if_none_usable(self) -> None:
        now = time.monotonic()
        if any(s.usable for s in self._servers):
            self._usable_since = now
        elif now - self._usable_since > self._timeouts.wait:
            urls = ", ".join(s.url for s in self._servers)
            for pending in self._waiting:
                if pending.waiting is not None and not pending.waiting.done():
                    pending.waiting.set_exception(
                        MachineFailure(
                            f"no rollout server with the current weights for {self._timeouts.wait:g} s "
                            f"(rollout.server.start_timeout_seconds) among {urls}; see logs/vllm_*.log"
                        )
                    )
            self._waiting.clear()


def _out_of_files() -> str:
    return f"this process can open no more connections, its limit of open files is {limits.open_files()} (`ulimit -n`)"
