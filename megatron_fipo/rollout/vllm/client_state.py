"""State of the vLLM client: its servers and pending requests, in the client's thread."""

from __future__ import annotations

import asyncio
import secrets
import ssl
from dataclasses import dataclass, field

import httpx

from megatron_fipo.rollout.vllm.control import address, authorization

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
    attempts: set[asyncio.Task[httpx.Response]] = field(default_factory=set)
    probe_now: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class PendingRequest:
    """Pending request: it waits for a server, is dispatched to one, or is paused."""

    tokens: int
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
