"""The control routes of one vLLM server: what is not generation."""

from __future__ import annotations

from typing import Any

import httpx

UNFINISHED = "unfinished"  # weight version of a server during an update: its responses do not count


class ControlError(RuntimeError):
    """A server did not carry out a control request; the message names it and its answer."""


class Control:
    """Blocking calls, from any thread."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        # Proxies are for the outside world; servers are on this machine or the job's own network.
        # A connection that is kept may be closed by the server just when it is used again.
        limits = httpx.Limits(max_keepalive_connections=0)
        base, socket = address(url)
        transport = httpx.HTTPTransport(uds=socket, limits=limits, trust_env=False)
        self._client = httpx.Client(base_url=base, headers=authorization(key), transport=transport, trust_env=False)

    def close(self) -> None:
        self._client.close()

    def healthy(self, timeout: float = 5.0) -> bool:
        try:
            return self._client.get("/health", timeout=timeout).status_code == 200
        except httpx.TransportError:
            return False

    def version(self, timeout: float) -> str:
        """Return the version of the weights. The answer comes from the engine, not from the HTTP process before it.

        Raises:
            ControlError: no answer within `timeout` seconds, or another one.
        """
        return str(self._ask("/weight_info", "weight_version", timeout))

    def world_size(self, timeout: float) -> int:
        return int(self._ask("/get_world_size", "world_size", timeout))

    def post(self, route: str, body: dict[str, Any] | None = None, *, timeout: float, **query: str) -> dict[str, Any]:
        """Return the answer's JSON object; {} where the body is empty, as some releases answer what has no result.

        Raises:
            ControlError: no answer within `timeout` seconds, or not 200.
        """
        return self._call("POST", route, timeout, json=body, params=query)

    def sleep(self, timeout: float) -> None:
        """Have the server free its GPUs, weights and cache included.

        Raises:
            ControlError: it did not, or did not confirm it.
        """
        self._change_state("/sleep", "sleeping", timeout, level="2", mode="abort")

    def wake_up(self, timeout: float) -> None:
        """Have the server take its GPUs again; its weights are undefined until the next update.

        Raises:
            ControlError: it did not, or only in part.
        """
        self._change_state("/wake_up", "awake", timeout)

    def _change_state(self, route: str, expected: str, timeout: float, **query: str) -> None:
        state = self._call("POST", route, timeout, params=query).get("status")
        if state is None:  # a release that answers nothing here
            state = "sleeping" if self._ask("/is_sleeping", "is_sleeping", timeout) else "awake"
        if state != expected:
            raise ControlError(f"{self.url}{route}: the server is {state!r} after it, expected {expected!r}")

    def loaded(self, timeout: float) -> list[dict[str, Any]]:
        """Each worker's comparison of its parameters with what it received (worker/fipo_worker.py)."""
        answer = self.post("/collective_rpc", {"method": "fipo_loaded"}, timeout=timeout)
        return self._field("/collective_rpc", answer, "results")

    def _ask(self, route: str, field: str, timeout: float) -> Any:
        return self._field(route, self._call("GET", route, timeout), field)

    def _field(self, route: str, answer: dict[str, Any], name: str) -> Any:
        if name not in answer:
            raise ControlError(f"{self.url}{route} answered {answer or 'nothing'}, expected {name!r} in it")
        return answer[name]

    def _call(self, method: str, route: str, timeout: float, **content: Any) -> dict[str, Any]:
        try:
            answer = self._client.request(method, route, timeout=timeout, **content)
        except httpx.TransportError as error:
            raise ControlError(f"{self.url}{route}: {type(error).__name__} {error}".rstrip()) from None
        if answer.status_code != 200:
            raise ControlError(f"{self.url}{route} answered {explain(answer)}")
        if not answer.content.strip():
            return {}
        try:
            content = answer.json()
        except ValueError:  # also of bytes that are no text
            pass
        else:
            if isinstance(content, dict):
                return content
        raise ControlError(f"{self.url}{route} answered {answer.text[:500]!r}, expected a JSON object or nothing")


def address(url: str) -> tuple[str, str | None]:
    """Return the base URL of a server's requests, and the path of its Unix socket where `url` is `unix:PATH`."""
    return ("http://localhost", url.removeprefix("unix:")) if url.startswith("unix:") else (url, None)


def authorization(key: str) -> dict[str, str]:
    """Return the header that carries a server's key."""
    return {"Authorization": f"Bearer {key}"}


def explain(answer: httpx.Response) -> str:
    """Return an error's status, the server's message, and what to do where that is known."""
    advice = {
        401: "wrong or missing key: set MEGATRON_FIPO_VLLM_KEY to the key that the server was started with",
        403: "the server was not started with --enable-scale-out",
        404: "is this a vLLM server of a supported version, started with VLLM_SERVER_DEV_MODE=1?",
    }.get(answer.status_code)
    return f"{answer.status_code}: " + (f"{advice}; " if advice else "") + answer.text[:500].strip()
