"""Open files and processes: raised as far as they go, refused where that is too little, and never exceeded."""

from __future__ import annotations

import asyncio
import errno
import json
import resource
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from megatron_fipo.launch import requirements
from megatron_fipo.machine import limits
from tests.support.policies import make_config
from tests.support.waiting import PATIENCE

HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
NUM_SERVERS, NUM_REQUESTS = 32, 2048


class Servers:
    """Many small rollout servers in one thread, which hold all responses back until `gate` requests are in flight.

    Attributes:
        asked: requests of each port. most: the most in flight at the same time.
    """

    def __init__(self, gate: int) -> None:
        self.gate = gate
        self.asked: Counter[int] = Counter()
        self.busy = self.most = 0
        self.ports: list[int] = []

    async def serve(self, started: threading.Event, stop: asyncio.Event) -> None:
        self.opened = asyncio.Event()
        servers = [await asyncio.start_server(self._answer, "127.0.0.1", 0, backlog=256) for _ in range(NUM_SERVERS)]
        self.ports = [server.sockets[0].getsockname()[1] for server in servers]
        started.set()
        await stop.wait()
        for server in servers:
            server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                size = next((int(x.split(":")[1]) for x in head.splitlines() if x.startswith("content-length")), 0)
                body = await reader.readexactly(size)
                content = await self._generate(json.loads(body), writer) if size else {"weight_version": "run-1"}
                text = json.dumps(content).encode()
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text) + text)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _generate(self, body: dict, writer: asyncio.StreamWriter) -> dict:
        self.asked[writer.get_extra_info("sockname")[1]] += 1
        self.busy += 1
        self.most = max(self.most, self.busy)
        if self.busy >= self.gate:
            self.opened.set()
        await self.opened.wait()
        self.busy -= 1
        token = body["token_ids"][0]
        choice = {"token_ids": [token], "logprobs": {"content": [{"logprob": -1.0}]}, "finish_reason": "length"}
        return {"choices": [choice | {"weight_versions": [{"version": "run-1"}]}]}


@contextmanager
def serving(gate: int) -> Iterator[Servers]:
    servers, started = Servers(gate), threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(servers.serve(started, stop),))
    thread.start()
    try:
        assert started.wait(60)
        yield servers
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


CLIENT = """
import resource, sys
from megatron_fipo.machine import limits
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, int(sys.argv[1])))
limits.raise_limits()
from megatron_fipo.rollout.protocol import Request, Sampling
from megatron_fipo.rollout.vllm.client import Client, ClientTimeouts
urls = [f"http://127.0.0.1:{port}" for port in sys.argv[3:]]
client = Client(urls, ["key"] * len(urls), ClientTimeouts(deadline=120.0, wait=60.0), 256)
client.expect("run-1", [True] * len(urls))
futures = [client.submit(Request([n], n), Sampling(1.0, 1.0, 0, 1, (9999,))) for n in range(int(sys.argv[2]))]
assert [f.result().token_ids for f in futures] == [[n] for n in range(len(futures))]
assert all(server.usable and not server.pause for server in client._servers)
print("all responses")
client.close()
"""


@pytest.fixture
def room_for_servers() -> Iterator[None]:
    """This process has both ends' worth of open files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits.raise_limits()
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.skipif(HARD != resource.RLIM_INFINITY and HARD < 6000, reason="the test itself opens 5,000 files")
@pytest.mark.parametrize(
    ("hard", "gate", "least", "most"),
    [
        (1024, 500, 500, 1024),
        pytest.param(4096, 2048, 2048, 2048, marks=pytest.mark.slow),  # the same, with twice the connections
    ],
)
def test_2048_requests(hard: int, gate: int, least: int, most: int, room_for_servers: None) -> None:
    """2,048 requests to 32 servers, under a soft limit of 1,024 open files: each is asked once and answered, no server
    is set aside. A higher hard limit has them all in flight at once; otherwise as many as fit, and the rest wait."""
    with serving(gate) as servers:
        command = [sys.executable, "-c", CLIENT, str(hard), str(NUM_REQUESTS), *map(str, servers.ports)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.stdout == "all responses\n", done.stderr[-3000:]
    assert servers.asked.total() == NUM_REQUESTS
    assert set(servers.asked) == set(servers.ports)
    assert least <= servers.most <= most


def test_soft_limits_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft limits of open files and processes are raised to the hard ones; the change is reported."""
    held = {resource.RLIMIT_NOFILE: (1024, 65536), resource.RLIMIT_NPROC: (4096, 4096)}
    monkeypatch.setattr(resource, "getrlimit", lambda number: held[number])
    monkeypatch.setattr(resource, "setrlimit", lambda number, pair: held.update({number: pair}))
    assert limits.raise_limits() == {"open files (ulimit -n)": (1024, 65536)}
    assert held[resource.RLIMIT_NOFILE] == (65536, 65536)
    assert limits.raise_limits() == {}


COLOCATED = {"placement": "colocated", "tensor_parallel_size": 4}


@pytest.mark.parametrize(
    ("rollout", "parallel", "files"),
    [
        # The 32B recipe: 32 servers that run 256 responses, shared by 8 replicas; 128 ranks.
        ({"server": COLOCATED, "prompts_per_round": 2048, "group_size": 16}, 8, 1984),
        ({"server": COLOCATED, "prompts_per_round": 8, "group_size": 16}, 8, 1088),
        (
            {"server": {"urls": ("http://a:1",), "max_num_seqs": 64}, "prompts_per_round": 2048, "group_size": 16},
            8,
            782,
        ),
    ],
)
def test_files_that_a_configuration_opens(rollout: dict, parallel: int, files: int) -> None:
    """A connection for each response in flight, six for each server, four for each rank, and 256 other files."""
    layout = {"world_size": 128, "tensor": 128 // parallel}
    extra = {"optimizer": {"offload_state": True}} if rollout["server"] is COLOCATED else {}
    config = make_config("unused", parallel=layout, rollout={"engine": "vllm", **rollout}, **extra)
    assert requirements(config, {}).open_files == files


def test_a_hard_limit_that_is_too_low(monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence with both numbers, and what to do; none where it is enough."""
    monkeypatch.setattr(resource, "getrlimit", lambda number: (1024, 4096))
    assert limits.open_files_problem(4096) is None
    problem = limits.open_files_problem(5056)
    assert problem is not None
    assert problem.startswith(
        "the limit of open files is 4096 (`ulimit -Hn`), but a rank of this configuration opens up"
    )
    assert "5056" in problem


def test_which_errors_are_of_this_process() -> None:
    """EMFILE and ENFILE, wherever in the chain of causes; a refused connection is the server's."""
    inner = OSError("all attempts failed")
    inner.__cause__ = ExceptionGroup("attempts", [OSError(errno.EMFILE, "Too many open files")])
    outer = httpx.ConnectError("connect")
    outer.__cause__ = inner
    assert limits.is_out_of_files(outer)
    assert not limits.is_out_of_files(httpx.ConnectError("refused"))
    assert not limits.is_out_of_files(OSError(errno.ECONNREFUSED, "refused"))
