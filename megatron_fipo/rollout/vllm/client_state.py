"""State of the vLLM client: its servers and pending requests, in the client's thread."""

from __future__ import annotations

import asyncio
import secrets
import ssl
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import httpx

from megatron_fipo.rollout.vllm.control import address, authorization

_SPEED_UPDATE = 0.1  # weight of the latest response
_CONNECT_SECONDS = 60.0  # thousands of requests may begin at once; probes find a server that is gone


@dataclass(eq=False)
class ServerState:
    """State of one server, as its client sees it."""

    number: int
    url: str
    http: httpx.AsyncClient
    usable: bool = False
    busy: int = 0  # requests dispatched to it
    outstanding: int = 0  # their tokens: prompts and limits of responses
    strikes: int = 0
    pause: float = 0.0
    speed: float | None = None  # tokens per second of a response, as of those that it finished lately
    attempts: set[asyncio.Task[httpx.Response]] = field(default_factory=set)
    probe_now: asyncio.Event = field(default_factory=asyncio.Event)

    def note_speed(self, speed: float) -> None:
        """Average the speeds of responses, the latest ones most."""
        self.speed = speed if self.speed is None else self.speed + _SPEED_UPDATE * (speed - self.speed)


@dataclass(eq=False)
class PendingRequest:
    """Pending request: it waits for a server, is dispatched to one, or is paused.

    Attributes:
        tokens: of its prompt and its longest response.
        max_tokens: of its longest response.
        sent_at: time at which it was dispatched, and so begun, since servers have no more requests than they run.
    """

    tokens: int
    max_tokens: int
    sent_at: float = 0.0
    name: str = field(default_factory=lambda: secrets.token_hex(8))  # request ID on the servers
    paused: bool = False
    avoid: set[int] = field(default_factory=set)
    waiting: asyncio.Future[ServerState | None] | None = None

    @property
    def server(self) -> ServerState | None:
        """Server that it was dispatched to, if any."""
        future = self.waiting
        if future is None or not future.done() or future.cancelled() or future.exception() is not None:
            return None
        return future.result()


def tokens_so_far(pending: PendingRequest, speeds: Sequence[float], now: float) -> int:
    """Return how many tokens a response is estimated to have: servers tell only when it is finished.

    Args:
        speeds: of all servers of which one is known.
    """
    server = pending.server
    if server is None or not speeds:
        return 0
    speed = server.speed if server.speed is not None else sum(speeds) / len(speeds)
    return min(int(speed * (now - pending.sent_at)), pending.max_tokens)


def share_of_capacity(
    servers: Sequence[ServerState], capacity: int, client: int, clients: int
) -> dict[ServerState, int]:
    """Return how many requests one of several clients may have at each server; at one of them, one at least.

    The shares of all clients add up to the capacity of each server, unless there are more clients than all capacity.
    """
    whole, rest = divmod(capacity, clients)
    shares = {s: whole + ((client + s.number * rest) % clients < rest) for s in servers}
    if servers and not any(shares.values()):
        shares[servers[client % len(servers)]] = 1
    return shares


def preferred(
    servers: Sequence[ServerState], shares: Mapping[ServerState, int], avoid: Collection[int]
) -> Sequence[ServerState]:
    """Return the servers for a request: one that failed it only if there is no other, not even one without a share."""
    others = [s for s in servers if s.number not in avoid]
    return [s for s in others if shares[s]] or others or servers


def connection_pool(url: str, key: str, concurrency: int, context: ssl.SSLContext) -> httpx.AsyncClient:
    """Return the connections to one server: for its requests, a probe, and an abort."""
    base, socket = address(url)
    most = httpx.Limits(max_connections=concurrency + 2, max_keepalive_connections=4)
    return httpx.AsyncClient(
        base_url=base,
        headers=authorization(key),
        timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
        transport=httpx.AsyncHTTPTransport(verify=context, uds=socket, limits=most, trust_env=False),
        trust_env=False,
    )
