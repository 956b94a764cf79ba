"""The key in front of a vLLM server: what passes without it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from megatron_fipo.rollout.vllm.worker.fipo_access import RequireKey

GOOD, BAD = (b"authorization", b"Bearer secret"), (b"authorization", b"Bearer Secret")


def ask(scope: dict[str, Any]) -> tuple[bool, list[dict[str, Any]]]:
    """Whether the server saw a request, and what was sent to the client instead."""
    seen: list[Any] = []
    sent: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(RequireKey(app)(scope, None, send))
    return bool(seen), sent


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")


@pytest.mark.parametrize("path", ["/health", "/v1/realtime", "/collective_rpc"])
@pytest.mark.parametrize("headers", [[], [BAD], [(b"cookie", b"Bearer secret")]])
def test_websockets_need_the_key(path: str, headers: list[tuple[bytes, bytes]]) -> None:
    """On any path; they are closed before they are accepted, for a violation of policy."""
    scope = {"type": "websocket", "path": path, "headers": headers}
    assert ask(scope) == (False, [{"type": "websocket.close", "code": 1008}])
    assert ask({**scope, "headers": [GOOD]}) == (True, [])


def test_requests_need_the_key() -> None:
    """All but /health, spelled just so; the server's own start and end pass."""
    for path in ("/weight_info", "/health/", "//health", "/health/../weight_info", ""):
        passed, sent = ask({"type": "http", "path": path, "headers": [BAD]})
        assert (passed, sent[0]["status"]) == (False, 401)
        assert ask({"type": "http", "path": path, "headers": [GOOD]}) == (True, [])
    assert ask({"type": "http", "path": "/health", "headers": []}) == (True, [])
    assert ask({"type": "lifespan"}) == (True, [])


def test_a_server_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Does not start."""
    monkeypatch.setenv("VLLM_API_KEY", "")
    with pytest.raises(RuntimeError, match="VLLM_API_KEY is not set"):
        RequireKey(lambda *_: asyncio.sleep(0))
