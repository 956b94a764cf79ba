"""Ranks start with the right names, end together, and say what went wrong in the words of the rank that failed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_fipo import launch
from megatron_fipo.config import ParallelConfig

TWO_RANKS = ParallelConfig(world_size=2, threads_per_rank=1)
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "12",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3,1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`launch.run` sets what the ranks are to inherit."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


def _record(directory: Path) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    found = {
        **{name: int(os.environ[name]) for name in names},
        "rank": dist.get_rank(),
        "world": dist.get_world_size(),
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
    }
    (directory / f"{dist.get_rank()}.json").write_text(json.dumps(found))


def _recorded(directory: Path) -> list[dict[str, int]]:
    return [json.loads(f.read_text()) for f in sorted(directory.glob("*.json"))]


@pytest.mark.distributed
def test_local_ranks_know_their_place(tmp_path: Path) -> None:
    """Each rank runs the entry once, in its own process, with torch's variables, group and the threads asked for."""
    launch.run(_record, TWO_RANKS, (tmp_path,))
    found = _recorded(tmp_path)
    pids = {f.pop("pid") for f in found}
    assert len(pids | {os.getpid()}) == 3
    assert found == [
        {"RANK": r, "WORLD_SIZE": 2, "LOCAL_RANK": r, "LOCAL_WORLD_SIZE": 2, "rank": r, "world": 2, "threads": 1}
        for r in range(2)
    ]


def _fail_on_one(kind: str) -> None:
    if dist.get_rank() == 0:
        time.sleep(60)
    if kind == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    raise {"ValueError": ValueError, "RuntimeError": RuntimeError}[kind]("the first line\n  - the second")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "expected", "says"),
    [
        ("RuntimeError", launch.RankFailure, "(?s)^rank 1 failed first: RuntimeError: the first.*in _fail_on_one"),
        ("ValueError", ValueError, "^the first line\n  - the second$"),
        ("signal", launch.RankFailure, "rank 1 failed first: .*SIGKILL"),
    ],
)
def test_a_failed_rank_ends_the_others(kind: str, expected: type[Exception], says: str) -> None:
    """Within seconds, though rank 0 sleeps for a minute; the error is the failed rank's, its traceback included."""
    started = time.monotonic()
    with pytest.raises(expected, match=says):
        launch.run(_fail_on_one, TWO_RANKS, (kind,))
    assert time.monotonic() - started < 30


def _fail_while_the_other_waits() -> None:
    if dist.get_rank() == 1:
        raise ValueError("mend this")
    dist.barrier()


@pytest.mark.distributed
@pytest.mark.parametrize("attempt", range(3))
def test_the_failure_shown_is_the_first(attempt: int) -> None:
    """Not that of a rank which waited for the failed one and lost its connection."""
    with pytest.raises(ValueError, match=r"^mend this$"):
        launch.run(_fail_while_the_other_waits, TWO_RANKS)


def _record_and_sleep(directory: Path) -> None:
    (directory / f"{dist.get_rank()}.pid").write_text(str(os.getpid()))
    time.sleep(120)


def _poll(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def _alive(pid: int) -> bool:
    """A zombie is dead, and stays one where nothing reaps orphans."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_rank_outlives_the_command(number: signal.Signals, tmp_path: Path) -> None:
    """Killed outright or asked to end, the launching process takes its ranks with it."""
    code = (
        "from pathlib import Path; from megatron_fipo import launch; from tests import test_launch as t;"
        f"launch.run(t._record_and_sleep, t.TWO_RANKS, (Path({str(tmp_path)!r}),))"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL, start_new_session=True
    )
    pids: list[int] = []
    try:
        assert _poll(lambda: len([f for f in tmp_path.glob("*.pid") if f.read_text()]) == 2, 90)
        pids = [int(f.read_text()) for f in tmp_path.glob("*.pid")]
        assert all(map(_alive, pids))
        parent.send_signal(number)
        parent.wait(timeout=30)
        assert _poll(lambda: not any(map(_alive, pids)), 20)
    finally:
        parent.kill()
        parent.wait()
        for pid in filter(_alive, pids):
            os.kill(pid, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_under_torchrun_this_process_is_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With RANK and WORLD_SIZE set nothing is started, whatever `world_size` says, and the group is closed again."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**variables, "MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())}.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    try:
        launch.run(_record, TWO_RANKS, (tmp_path,))
    finally:
        torch.set_num_threads(threads)
    (found,) = _recorded(tmp_path)
    assert (found["pid"], found["rank"], found["world"]) == (os.getpid(), 0, 1)
    assert not dist.is_initialized()


def test_srun_variables_become_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank, world, local rank, and the tasks on this node of the step's `4(x2),3,1`."""
    monkeypatch.setattr(os, "environ", dict(SLURM))
    launch._adopt_slurm_environment()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert [os.environ[name] for name in names] == ["5", "12", "1", "4"]


@pytest.mark.parametrize(("node", "tasks"), [("0", "4"), ("1", "4"), ("2", "3"), ("3", "1")])
def test_srun_tasks_on_each_node(node: str, tasks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of a step may run different numbers of tasks."""
    monkeypatch.setattr(os, "environ", {**SLURM, "SLURM_NODEID": node})
    launch._adopt_slurm_environment()
    assert os.environ["LOCAL_WORLD_SIZE"] == tasks


def test_srun_needs_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the missing variables and where to set them."""
    environment = {k: v for k, v in SLURM.items() if not k.startswith("MASTER")}
    monkeypatch.setattr(os, "environ", environment)
    with pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT not set: export them in the batch script"):
        launch.run(_record, TWO_RANKS, ())


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {**SLURM, "SLURM_NTASKS": "1"},  # srun -n 1: this command starts the ranks
        {k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"},  # the batch script itself
        {**SLURM, "RANK": "3"},  # torchrun under srun
    ],
)
def test_other_environments_are_left_alone(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a step of several tasks no variable is touched."""
    monkeypatch.setattr(os, "environ", dict(environment))
    launch._adopt_slurm_environment()
    assert os.environ == environment


@pytest.mark.parametrize(
    ("environment", "first"),
    [({}, True), ({"RANK": "0"}, True), ({"RANK": "1"}, False), (SLURM, False), ({"SLURM_PROCID": "0"}, True)],
)
def test_first_process(environment: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's only process, or rank 0."""
    monkeypatch.setattr(os, "environ", dict(environment))
    assert launch.is_first_process() is first
