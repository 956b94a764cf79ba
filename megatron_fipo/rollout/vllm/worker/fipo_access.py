"""ASGI middleware for a vLLM server: nothing but /health without the key, and no websockets without it.

vLLM's own check covers the paths under /v1 and /inference and leaves the control routes open, through which anybody
who reaches the port could replace the model.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

_OPEN = {"/health"}


class RequireKey:
    """Lets requests pass that bear the key in VLLM_API_KEY.

    Raises:
        RuntimeError: when made without one in the environment.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        key = os.environ.get("VLLM_API_KEY")
        if not key:
            raise RuntimeError("VLLM_API_KEY is not set: the control routes would be open to anybody")
        self.app = app
        self._expected = hashlib.sha256(f"Bearer {key}".encode()).digest()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        kind = scope["type"]
        if kind == "lifespan" or (kind == "http" and scope["path"] in _OPEN) or self._allowed(scope):
            await self.app(scope, receive, send)
            return
        if kind != "http":
            await send({"type": f"{kind}.close", "code": 1008})
            return
        body = json.dumps({"error": "this server needs its key: Authorization: Bearer <key>"}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _allowed(self, scope: dict[str, Any]) -> bool:
        given = next((value for name, value in scope.get("headers", ()) if name.lower() == b"authorization"), b"")
        return hmac.compare_digest(hashlib.sha256(given).digest(), self._expected)
