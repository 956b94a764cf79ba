"""The control routes of one vLLM server: what is not generation."""

from __future__ import annotations

from typing import Any

import httpx

UNFINISHED = "unfinished"  # weight version of a server between two versions: what it draws is nobody's


class ControlError(RuntimeError):
    """A server did not do what it was told; the message names it and its answer."""


class Control:
    """Blocking calls, from any thread."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        # Proxies are for the outside world; servers are on this machine or the job's own network.
        # A connection that is kept may be closed by the server just when it is used again.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(base_url=url, headers=authorization(key), limits=limits, trust_env=False)

    def close(self) -> None:
        self._client.close()

    def healthy(self, timeout: float = 5.0) -> bool:
        try:
            return self._client.get("/health", timeout=timeout).status_code == 200
        except httpx.TransportError:
            return False

    def version(self, timeout: float) -> str:
        """Of the weights. The answer comes from the engine itself, not from the process in front of it.

        Raises:
            ControlError: no answer within `timeout` seconds, or another one.
        """
        return str(self._call("GET", "/weight_info", timeout)["weight_version"])

    def world_size(self, timeout: float) -> int:
        return int(self._call("GET", "/get_world_size", timeout)["world_size"])

    def post(self, route: str, body: dict[str, Any] | None = None, *, timeout: float, **query: str) -> dict[str, Any]:
        """
        Raises:
            ControlError: no answer within `timeout` seconds, or not 200.
        """
        return self._call("POST", route, timeout, json=body, params=query)

    def loaded(self, timeout: float) -> list[dict[str, Any]]:
        """Each worker's comparison of its parameters with what it received (worker/fipo_worker.py)."""
        return self.post("/collective_rpc", {"method": "fipo_loaded"}, timeout=timeout)["results"]

    def _call(self, method: str, route: str, timeout: float, **content: Any) -> dict[str, Any]:
        try:
            answer = self._client.request(method, route, timeout=timeout, **content)
        except httpx.TransportError as error:
            raise ControlError(f"{self.url}{route}: {type(error).__name__} {error}".rstrip()) from None
        if answer.status_code != 200:
            raise ControlError(f"{self.url}{route} answered {explain(answer)}")
        return answer.json()


def authorization(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def explain(answer: httpx.Response) -> str:
    """An error's status, what the server says of it, and what to do where that is known."""
    advice = {
        401: "wrong or missing key: set MEGATRON_FIPO_VLLM_KEY to the key that the server was started with",
        403: "the server was not started with --enable-scale-out",
        404: "is this a vLLM server of a supported version, started with VLLM_SERVER_DEV_MODE=1?",
    }.get(answer.status_code)
    return f"{answer.status_code}: " + (f"{advice}; " if advice else "") + answer.text[:500].strip()
