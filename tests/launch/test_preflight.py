"""Ranks that do not come, do not match or cannot be reached are named before anything is built."""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import time
from collections import namedtuple
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.exit_codes import MachineFailure
from megatron_fipo.launch import preflight
from megatron_fipo.launch.rank_task import Requirements
from megatron_fipo.machine import limits
from tests.support.processes import free_port
from tests.support.ranks import fork
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.distributed

SHORT = timedelta(seconds=8)
Disk = namedtuple("Disk", ["total", "used", "free"])


def _run(act: Callable[[int, Path], None], directory: Path, world_size: int = 2, started: int = 2) -> list[str]:
    """Return the outcome of each rank: "ok", or its error. Rank r is on node r."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world_size)}
    ranks = []
    for rank in range(started):
        own = {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "SLURMD_NODENAME": f"node{rank}"}
        ranks.append(fork(_rank, {**shared, **own}, act, directory))
    try:
        for process in ranks:
            process.join(timeout=PATIENCE)
        return [(directory / f"{rank}.txt").read_text() for rank in range(started)]
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _rank(environment: dict[str, str], act: Callable[[int, Path], None], directory: Path) -> None:
    os.environ.update(environment)
    rank = int(environment["RANK"])
    try:
        act(rank, directory)
        result = "ok"
    except (ValueError, ConnectionError, MachineFailure) as error:
        result = f"{type(error).__name__}: {error}"
    (directory / f"{rank}.txt").write_text(result)
    while len(list(directory.glob("*.txt"))) < 2:  # as a failed rank does, stay until everybody has been heard
        time.sleep(0.05)


def _connect(rank: int, directory: Path) -> None:
    preflight.connect(timedelta(minutes=5), directory)
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    assert total.item() == 3
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    assert backend.options._timeout == timedelta(minutes=5)
    dist.destroy_process_group()


def test_all_is_well(tmp_path: Path) -> None:
    """The default group works, with the time limit asked for, and nothing is left in the run directory."""
    run = tmp_path / "run"
    assert _run(_connect_in_run, tmp_path) == ["ok", "ok"]
    assert list(run.iterdir()) == []


def _connect_in_run(rank: int, directory: Path) -> None:
    _connect(rank, directory / "run")


def _connect_shortly(rank: int, directory: Path) -> None:
    preflight.connect(SHORT, None)


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    """Rank 0 says which ranks are missing."""
    assert _run(_connect_shortly, tmp_path, world_size=4)[0] == (
        "ConnectionError: 2 of 4 ranks started within 8 s, without 2, 3"
    )


def _connect_under_srun(rank: int, directory: Path) -> None:
    os.environ |= {"SLURM_PROCID": f"{rank}", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "3"}
    os.environ |= {"SLURM_STEP_NODELIST": "node[0-2]"}
    preflight.connect(SHORT, None)


def test_a_node_that_never_comes(tmp_path: Path) -> None:
    """Under Slurm the nodes are known that no rank came from."""
    first, _ = _run(_connect_under_srun, tmp_path, world_size=3)
    assert first == "ConnectionError: 2 of 3 ranks started within 8 s, without 2; no rank started on node2"


def _see_other_directories(rank: int, directory: Path) -> None:
    preflight._VISIBLE_SECONDS = 1
    own = directory / f"disk{rank}"
    own.mkdir()
    preflight.connect(SHORT, own)


def test_a_directory_that_is_not_shared(tmp_path: Path) -> None:
    """The node that does not see rank 0's file is named, and what to change."""
    first, _ = _run(_see_other_directories, tmp_path)
    assert first == (
        f"ValueError: {tmp_path}/disk0 is not the same directory on node0 and for rank 1 on node1: choose a "
        "run.directory on a file system that all nodes share"
    )


def _lack(rank: int, directory: Path, lacking: tuple[int, ...]) -> None:
    (directory / "model").mkdir(exist_ok=True)  # where a file system would be mounted
    paths = {"model.hf_path": str(directory if rank not in lacking else directory / "model")}
    limits.open_files_problem = lambda needed: None if rank else "few files"  # type: ignore[assignment]
    preflight.connect(SHORT, None, requirements=Requirements(1, paths=paths if lacking == (1,) else {"x": "/nowhere"}))


def test_what_one_node_lacks(tmp_path: Path) -> None:
    """A node without the model, as after its restart, is named, with whatever another one lacks: machine trouble."""
    first, _ = _run(partial(_lack, lacking=(1,)), tmp_path)
    assert first.splitlines() == [
        "MachineFailure: rank 0 on node0: few files",
        f"rank 1 on node1: model.hf_path '{tmp_path}/model' is not there",
    ]


def test_what_all_nodes_lack(tmp_path: Path) -> None:
    """That is the configuration's fault; all is said at once."""
    first, _ = _run(partial(_lack, lacking=(0, 1)), tmp_path)
    assert first.splitlines() == ["ValueError: x '/nowhere' is not there", "rank 0 on node0: few files"]


def _differ(rank: int, directory: Path) -> None:
    versions = {"torch": "2.13.0", "transformers": "5.17.0" if rank else "5.16.1"}
    preflight._versions = lambda: versions  # type: ignore[assignment]
    preflight.connect(SHORT, None)


def test_other_versions(tmp_path: Path) -> None:
    """The package and the node are named."""
    first, _ = _run(_differ, tmp_path)
    assert first == (
        "ValueError: transformers is 5.16.1 on node0, but 5.17.0 for rank 1 on node1: start all ranks from the same "
        "environment"
    )


def _stop_halfway(rank: int, directory: Path) -> None:
    if rank == 0:
        preflight.connect(SHORT, None)
        return
    ranks = preflight._Ranks(preflight._store(SHORT, None))
    ranks.gather(SHORT, None)
    time.sleep(16)


@pytest.mark.slow
def test_a_rank_that_cannot_be_reached(tmp_path: Path) -> None:
    """It came, but does not connect: both ends are named, and the variables that choose a network."""
    first, _ = _run(_stop_halfway, tmp_path)
    assert first.startswith("ConnectionError: rank 0 on node0 and rank 1 on node1 could not reach all the others. ")
    assert "GLOO_SOCKET_IFNAME" in first


def _no_room(rank: int, directory: Path) -> None:
    shutil.disk_usage = lambda path: Disk(2**40, 2**40 - 2**20, 2**20)  # type: ignore[assignment]
    preflight.connect(SHORT, directory / "run")


def test_a_full_disk(tmp_path: Path) -> None:
    """Nothing can be written: an error, before a step's work is lost."""
    first, _ = _run(_no_room, tmp_path)
    assert first == f"ValueError: 1 MiB free in {tmp_path}/run: make room, or choose another run.directory"


@pytest.mark.parametrize(("free", "warnings"), [(2**30, ["only 1.0 GiB free in {}"]), (2**40, [])])
def test_little_disk(free: int, warnings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below 20 GiB, a warning."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(2**41, 0, free))
    assert preflight._disk_warnings(tmp_path) == [w.format(tmp_path) for w in warnings]


def test_a_gpu_that_is_in_use() -> None:
    """More than a tenth of its memory is taken: the ranks are named."""
    facts = [preflight.Facts(r, f"n{r // 2}", {}, None, free) for r, free in enumerate([0.99, 0.5, 0.98, 0.25])]
    assert preflight._memory_warnings(facts) == [
        "another process holds memory of the GPU of rank 1 on n0 and rank 3 on n1; free are 50%, 25%"
    ]


def test_time_to_come() -> None:
    """It grows with the number of ranks that start cold, up to the limit of any wait."""
    hour = timedelta(hours=1)
    assert preflight._arrival(hour, 256) == timedelta(minutes=10, seconds=1024)
    assert preflight._arrival(timedelta(minutes=5), 256) == timedelta(minutes=5)


def test_ranks_with_the_same_gpu() -> None:
    """Several local ranks that all see the same single GPU are refused, with the ranks named."""
    facts = [preflight.Facts(r, "n0", {}, None, gpu=gpu) for r, gpu in enumerate(["aaaa", "bbbb", "aaaa"])]
    with pytest.raises(ValueError, match=r"^ranks 0, 2 on n0 have the same GPU, aaaa: start at most as many ranks"):
        preflight._check(facts, None)
    preflight._check(facts[:2], None)


def test_weights_in_one_node_s_memory() -> None:
    """Refused where ranks, and so servers, are on several nodes; all that is wrong is said at once."""
    facts = [preflight.Facts(r, f"n{r}", {}, None, problems=["x"]) for r in range(2)]
    with pytest.raises(ValueError, match=r"^x\nfiles in memory$"):
        preflight._check(facts, None, Requirements(one_node="files in memory"))
    with pytest.raises(ValueError, match=r"^x$"):
        preflight._check(facts[:1], None, Requirements(one_node="files in memory"))


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(8, 0, 0), (8, 7, 7), (1, 5, 0)])
def test_own_gpu(visible: int, local_rank: int, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The local rank's, or the only one that srun lets the task see."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert preflight.device_index() == index


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the node and both numbers."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in {"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "8", "SLURMD_NODENAME": "n1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"^8 ranks on n1, which has 4 GPUs: start at most 4 ranks on a node$"):
        preflight.device_index()


@pytest.mark.parametrize(
    ("address", "nodes", "listens"),
    [
        ("127.0.0.1", 1, "127.0.0.1"),
        ("127.0.0.1", 2, "127.0.0.1"),  # as it was asked for
        ("this-node", 1, "127.0.1.1"),
        ("this-node", 2, "0.0.0.0"),  # where the other one could not connect
        ("other-name", 2, "127.0.0.2"),
    ],
)
def test_store_listens_at_one_address(address: str, nodes: int, listens: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0's port is on the address that MASTER_ADDR names, unless that name means the machine itself alone."""
    found = {"this-node": "127.0.1.1"}.get(address, address)
    if address == "other-name":  # an address that is no loopback one, as far as the check is concerned
        found = "127.0.0.2"
        monkeypatch.setattr(ipaddress, "ip_address", lambda text, read=ipaddress.ip_address: read("10.0.0.2"))
    place = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (found, 0))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [place])
    monkeypatch.setenv("WORLD_SIZE", str(nodes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with preflight._listener(address, 0) as listener:
        assert listener.getsockname()[0] == listens
