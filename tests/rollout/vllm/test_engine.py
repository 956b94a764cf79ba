"""The engine on two ranks, with servers that run already: who sends what, and what happens when they fail."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.parallel import interrupt
from megatron_fipo.rollout import Request, Sampling, VLLMEngine
from megatron_fipo.rollout.vllm.client import ClientTimeouts
from megatron_fipo.rollout.vllm.control import UNFINISHED
from megatron_fipo.rollout.vllm.engine import is_checked
from megatron_fipo.rollout.vllm.worker import fipo_wire
from tests.support.fake_server import KEY, FakeServer, tokens_for
from tests.support.policies import make_config
from tests.support.ranks import run_ranks
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.distributed

SAMPLING = Sampling(1.0, 1.0, 0, 8, (99,))
PATIENT = ClientTimeouts(deadline=PATIENCE, wait=20.0, probe=0.5, strikes=6, first=0.02, longest=0.2)


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    fakes = [FakeServer("default"), FakeServer("default")]
    yield fakes
    for fake in fakes:
        fake.close()


def make_engine(urls: list[str], directory: Path, key: str = KEY) -> VLLMEngine:
    os.environ["MEGATRON_FIPO_VLLM_KEY"] = key
    server = {"urls": tuple(urls), "weight_directory": str(directory / "weights")}
    rollout = {"engine": "vllm", "server": server}
    config = make_config("unused", run={"directory": str(directory)}, rollout=rollout)
    topology: Any = SimpleNamespace(rank=dist.get_rank(), world_size=dist.get_world_size(), device=torch.device("cpu"))
    return VLLMEngine(config, topology, PATIENT)


def weights(taken: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield weights as the actor exports them: taking the next tensor is a collective."""
    for name in "abc":
        dist.barrier()
        taken.append(name)
        yield name, torch.zeros(5)


def requests(rank: int) -> list[Request]:
    return [Request([1, 2, 3], 100 * rank + i) for i in range(20)]


def _draw_twice(urls: list[str], directory: Path) -> list[list[tuple[list[int], tuple[int, ...]]]]:
    """Tokens and weight versions of each response, after a first and a second update."""
    engine = make_engine(urls, directory)
    try:
        drawn = []
        for _ in range(2):
            engine.load_weights(weights([]))
            responses = engine.generate(requests(dist.get_rank()), SAMPLING)
            drawn.append([(r.token_ids, r.weight_versions) for r in responses])
        return drawn
    finally:
        engine.close()


def _expected(rank: int, version: int) -> list[tuple[list[int], tuple[int, ...]]]:
    return [(tokens_for(r.seed, [1, 2, 3]), (version,)) for r in requests(rank)]


def test_two_ranks(servers: list[FakeServer], tmp_path: Path) -> None:
    """Each rank draws its own requests from both servers, each once, with the newest weights; rank 0 sends those.

    Of rollout.server.weight_directory only what the run has put there is removed.
    """
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "mine.txt").write_text("not the run's")
    drawn = run_ranks(_draw_twice, 2, [s.url for s in servers], tmp_path)
    for rank in range(2):
        assert drawn[rank] == [_expected(rank, 1), _expected(rank, 2)]
    asked = servers[0].asked + servers[1].asked
    assert sorted(asked) == [r.seed for rank in range(2) for r in requests(rank)]
    assert set(asked.values()) == {2}
    assert min(s.asked.total() for s in servers) >= 20
    for server in servers:
        assert [route for route, _ in server.controls].count("/finish_weight_update") == 2
    assert [f.name for f in (tmp_path / "weights").iterdir()] == ["mine.txt"]


def test_proof_of_weights(servers: list[FakeServer], tmp_path: Path) -> None:
    """By default the first update carries checksums and asks what was loaded, the second one does not."""
    run_ranks(_draw_twice, 2, [s.url for s in servers], tmp_path)
    for server in servers:
        told = [body["update_info"]["checksums"] for route, body in server.controls if route == "/update_weights"]
        assert told == [[fipo_wire.checksum(torch.zeros(5))] * 3, []]
        assert [body for route, body in server.controls if route == "/collective_rpc"] == [{"method": "fipo_loaded"}]


def test_a_server_of_other_weights_gets_no_requests(servers: list[FakeServer], tmp_path: Path) -> None:
    """It computes with something else than it received: the other samples everything, and every update is checked."""
    servers[0].bodies["/collective_rpc"] = b'{"results": [{"compared": 3, "received": 3, "different": ["a"]}]}'
    drawn = run_ranks(_draw_twice, 2, [s.url for s in servers], tmp_path)
    for rank in range(2):
        assert drawn[rank] == [_expected(rank, 1), _expected(rank, 2)]
    assert [server.asked.total() for server in servers] == [0, 80]
    assert servers[0].version == UNFINISHED
    for server in servers:
        assert [route for route, _ in server.controls].count("/collective_rpc") == 2


@pytest.mark.parametrize(("every", "checked"), [(20, [1, 21, 41]), (1, [*range(1, 42)]), (0, [])])
def test_which_updates_are_checked(every: int, checked: list[int]) -> None:
    """The first and every Nth after it; 0: none."""
    assert [number for number in range(1, 42) if is_checked(number, every)] == checked


def _change_server(engine: VLLMEngine, **changes: Any) -> None:
    rollout = engine.config.rollout
    rollout = dataclasses.replace(rollout, server=dataclasses.replace(rollout.server, **changes))
    engine.config = dataclasses.replace(engine.config, rollout=rollout)


def _held(urls: list[str], directory: Path) -> list[int]:
    engine = make_engine(urls, directory)
    try:
        engine.load_weights(weights([]))
        held = [engine.held_version]
        _change_server(engine, urls=())  # as if the servers were this rank's own
        held.append(engine.held_version)
        managed = SimpleNamespace(current=True, state="ready")
        engine.supervisor.servers.append(managed)  # type: ignore[arg-type]
        for managed.current, managed.state in ((True, "ready"), (True, "lost"), (False, "ready"), (True, "ready")):
            held.append(engine.held_version)
        engine.supervisor.servers.clear()
        engine.load_weights(weights([]))
        held.append(engine.held_version)
        _change_server(engine, placement="colocated")
        engine.release()
        return [*held, engine.held_version]
    finally:
        engine.close()


def test_held_version(servers: list[FakeServer], tmp_path: Path) -> None:
    """Weights need not be sent again while all servers of this rank are ready and have them, and none has slept.

    External servers need them every time: others may have restarted them.
    """
    for held in run_ranks(_held, 2, [s.url for s in servers], tmp_path):
        assert held == [0, 1, 1, 0, 0, 1, 2, 0]


def test_server_that_takes_no_weights(servers: list[FakeServer], tmp_path: Path) -> None:
    """It is left out by all ranks; the others do its work."""
    servers[1].refuses = "/finish_weight_update"
    drawn = run_ranks(_draw_twice, 2, [s.url for s in servers], tmp_path)
    assert drawn[1] == [_expected(1, 1), _expected(1, 2)]
    assert servers[0].asked.total() == 80
    assert servers[1].asked.total() == 0


def _first_update(urls: list[str], directory: Path, key: str) -> tuple[str, list[str]]:
    """Return the error of the first update, and the tensors that were taken."""
    engine = make_engine(urls, directory, key)
    taken: list[str] = []
    try:
        engine.load_weights(weights(taken))
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}", taken
    finally:
        engine.close()
    return "", taken


def test_no_server_takes_weights(servers: list[FakeServer], tmp_path: Path) -> None:
    """All ranks raise, after all tensors were taken, so that none waits for another one."""
    for server in servers:
        server.refuses = "/update_weights"
    for error, taken in run_ranks(_first_update, 2, [s.url for s in servers], tmp_path, KEY):
        assert error.startswith("MachineFailure: no rollout server took the new weights")
        assert "/update_weights answered 500" in error
        assert taken == ["a", "b", "c"]


def test_wrong_key(servers: list[FakeServer], tmp_path: Path) -> None:
    """Found at the first word to a server; the key is not shown."""
    for error, _ in run_ranks(_first_update, 2, [s.url for s in servers], tmp_path, "wrong-key"):
        assert "401: wrong or missing key: set MEGATRON_FIPO_VLLM_KEY" in error
        assert "wrong-key" not in error


def test_full_disk(servers: list[FakeServer], tmp_path: Path) -> None:
    """Rank 0 cannot write: all ranks raise what it says."""
    (tmp_path / "weights").write_text("in the way")
    for error, taken in run_ranks(_first_update, 2, [s.url for s in servers], tmp_path, KEY):
        assert error.startswith("ValueError: weights could not be written: ")
        assert taken == ["a", "b", "c"]


def _interrupted(urls: list[str], directory: Path) -> None:
    engine = make_engine(urls, directory)
    interrupt.install()
    try:
        engine.load_weights(weights([]))
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(interrupt.Interrupted):
            engine.generate(requests(dist.get_rank()), SAMPLING)
    finally:
        engine.close()


def test_asked_to_stop(servers: list[FakeServer], tmp_path: Path) -> None:
    """Generation ends long before its responses are there and gives nothing; what was under way is cancelled."""
    for server in servers:
        server.delay = 600.0
    run_ranks(_interrupted, 2, [s.url for s in servers], tmp_path)
