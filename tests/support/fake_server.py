"""A server that speaks vLLM's routes, without vLLM: answers follow from the seed, and faults are switched on."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "right"
LOADED = b'{"results": [{"compared": 0, "received": 0, "different": []}]}'  # no parameter differs from what was sent


class FakeServer:
    """Serves in threads of this process until `close`.

    Attributes:
        version: of its weights; None: it does not tell.
        delay: seconds that a response takes. Paused earlier, it has the first half of its tokens.
        status: what it answers to generation requests.
        hung: it answers nothing at all, until this is False again.
        dead: its front is there, but no engine behind it.
        drops: so many more generation requests have their connection cut without an answer.
        vocabulary: size of the one that its tokens are from.
        routing: of so many inputs, as the server sends it; None: it sends none.
        asked: how often each seed was requested (None: no seed); `answered` how often a response was sent.
        most: the most responses it drew at the same time.
        bodies: what control routes answer instead of `{}`, as it goes over the wire; /collective_rpc answers `LOADED`.
        sleeping: what /is_sleeping answers; routes do not change it.
        key: what requests must show; `shown` counts what they did show.
    """

    def __init__(self, version: str | None = "run-1", delay: float = 0.0, uds: Path | None = None) -> None:
        """`uds`: path of the Unix socket on which it listens instead of a port."""
        self.version = version
        self.delay = delay
        self.status = 200
        self.hung = self.dead = False
        self.drops = 0
        self.vocabulary = 100
        self.routing: Callable[[int], Any] | None = None
        self.asked: Counter[int | None] = Counter()
        self.answered: Counter[int | None] = Counter()
        self.most = self.busy = 0
        self.controls: list[tuple[str, Any]] = []
        self.refuses: str | None = None  # a control route that answers 500
        self.bodies: dict[str, bytes] = {"/collective_rpc": LOADED}
        self.sleeping = False
        self.lock = threading.Lock()
        self.aborted: dict[str, threading.Event] = {}  # of requests under way
        self.key = KEY
        self.shown: Counter[str | None] = Counter()
        self._http = _Server(self, ("127.0.0.1", 0)) if uds is None else _UnixServer(self, str(uds))
        self.url = f"unix:{uds}" if uds else f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.hung = False
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def tokens_for(seed: int | None, prompt: list[int], vocabulary: int = 100) -> list[int]:
    """Return the answer of every fake server to a request."""
    draw = random.Random(f"{seed} {prompt}")
    return [draw.randrange(vocabulary) for _ in range(draw.randrange(1, 9))]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, fake: FakeServer, address: Any) -> None:
        super().__init__(address, _Handler)
        self.fake = fake


class _UnixServer(_Server):
    address_family = socket.AF_UNIX

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)

    def get_request(self) -> tuple[socket.socket, Any]:
        return self.socket.accept()[0], ("unix", 0)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.fake = self.server.fake
        self.connection.settimeout(10)

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._wait_while_hung()
        if self.path == "/health":
            self._send(200, {})
        elif self.path in self.fake.bodies:
            self._send_bytes(200, self.fake.bodies[self.path])
        elif self.path == "/is_sleeping":
            self._send(200, {"is_sleeping": self.fake.sleeping})
        elif self._allowed():
            self._send(500 if self.fake.dead else 200, {"weight_version": self.fake.version})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"null")
        self._wait_while_hung()
        if not self._allowed():
            return
        route = self.path.split("?")[0]
        if route == "/inference/v1/generate":
            self._generate(body)
        elif route == "/inference/v1/abort_requests":
            self._abort(body["request_ids"])
        else:
            self._control(route, body)

    def _control(self, route: str, body: Any) -> None:
        with self.fake.lock:
            self.fake.controls.append((route, body))
        if route == self.fake.refuses:
            self._send(500, {"error": "refused"})
            return
        if route == "/update_weight_version":
            self.fake.version = body["new_version"]
        self._send_bytes(200, self.fake.bodies.get(route, b"{}"))

    def _abort(self, names: list[str]) -> None:
        with self.fake.lock:
            for name in names:
                if name in self.fake.aborted:
                    self.fake.aborted[name].set()
        self._send(200, {})

    def _generate(self, body: dict[str, Any]) -> None:
        fake, seed, name = self.fake, body["sampling_params"]["seed"], f"generate-tokens-{body['request_id']}"
        with fake.lock:
            fake.asked[seed] += 1
            fake.busy += 1
            fake.most = max(fake.most, fake.busy)
            dropped = fake.drops > 0
            fake.drops -= dropped
            aborted = fake.aborted[name] = threading.Event()
        paused = self._work(aborted)
        self._wait_while_hung()
        with fake.lock:
            fake.busy -= 1
            del fake.aborted[name]
        if dropped:
            self.close_connection = True
            self.connection.close()
        elif fake.status != 200:
            self._send(fake.status, {"error": "broken"})
        else:
            tokens = tokens_for(seed, body["token_ids"], fake.vocabulary)
            if paused:
                tokens = tokens[: len(tokens) // 2]
            inputs = len(body["token_ids"]) + len(tokens) - 1
            with fake.lock:  # before it is sent: whoever has it may look at once
                fake.answered[seed] += 1
            try:
                self._send(200, self._answer(tokens, inputs, "abort" if paused else "length"))
            except OSError:
                with fake.lock:
                    fake.answered[seed] -= 1
                raise

    def _work(self, aborted: threading.Event) -> bool:
        """Wait as long as a response takes; whether it was aborted before. A delay that is shortened counts at once."""
        started = time.monotonic()
        while (left := started + self.fake.delay - time.monotonic()) > 0:
            if aborted.wait(min(left, 0.05)):
                return True
        return aborted.is_set()

    def _answer(self, token_ids: list[int], inputs: int, finish_reason: str) -> dict[str, Any]:
        version = self.fake.version
        choice = {
            "token_ids": token_ids,
            "logprobs": {"content": [{"token_id": t, "logprob": -t / 100} for t in token_ids]},
            "finish_reason": finish_reason,
            "weight_versions": [{"version": version, "start": 0, "end": len(token_ids)}] if version else None,
            **({} if self.fake.routing is None else {"routed_experts": self.fake.routing(inputs)}),
        }
        return {"choices": [choice]}

    def _allowed(self) -> bool:
        self.fake.shown[self.headers.get("Authorization")] += 1
        if self.headers.get("Authorization") == f"Bearer {self.fake.key}":
            return True
        self._send(401, {"error": "who are you?"})
        return False

    def _wait_while_hung(self) -> None:
        while self.fake.hung:
            time.sleep(0.01)

    def _send(self, status: int, content: dict[str, Any]) -> None:
        self._send_bytes(status, json.dumps(content).encode())

    def _send_bytes(self, status: int, data: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # the client has given up
            self.close_connection = True
