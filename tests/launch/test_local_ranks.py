"""Ranks start with the right names, end together, and say what went wrong in the words of the rank that failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from megatron_fipo import launch
from megatron_fipo.launch import processes, supervisor
from tests.support.processes import TWO_RANKS, alive, await_pids, command, free_port, pids, sleep
from tests.support.waiting import wait_until


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


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_that_start_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks start as on a machine with a GPU, instead of being forked from a server."""
    monkeypatch.setattr(processes, "start_method", lambda: "spawn")
    launch.run(_record, TWO_RANKS, (tmp_path,))
    assert [found["rank"] for found in _recorded(tmp_path)] == [0, 1]


def _record_sockets(directory: Path) -> None:
    dist.all_reduce(torch.ones(1))
    listening = {c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}
    group: Any = dist.group.WORLD
    store = group.get_group_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    parent = Path(store.path).parent.stat()
    found = [sorted(listening), type(store).__name__, oct(parent.st_mode & 0o777), parent.st_uid]
    (directory / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()


@pytest.mark.distributed
def test_local_ranks_are_out_of_reach(tmp_path: Path) -> None:
    """They meet through a file in a directory of this user alone, and listen on the loopback address only."""
    launch.run(_record_sockets, TWO_RANKS, (tmp_path,))
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == [["127.0.0.1"], "FileStore", "0o700", os.getuid()]


def _fail_on_one(kind: str) -> None:
    if dist.get_rank() == 0:
        time.sleep(600)
    if kind == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    raise {"ValueError": ValueError, "RuntimeError": RuntimeError}[kind]("the first line\n  - the second")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "expected", "says"),
    [
        (
            "RuntimeError",
            launch.RankFailure,
            "(?s)^rank 1 on .* failed first: RuntimeError: the first.*in _fail_on_one",
        ),
        ("ValueError", ValueError, "^the first line\n  - the second$"),
        ("signal", launch.RankFailure, "rank 1 on .* failed first: .*SIGKILL"),
    ],
)
def test_a_failed_rank_ends_the_others(kind: str, expected: type[Exception], says: str) -> None:
    """At once, though rank 0 would sleep for ten minutes; the error is the failed rank's, its traceback included."""
    with pytest.raises(expected, match=says):
        launch.run(_fail_on_one, TWO_RANKS, (kind,))


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


def _die_while_the_other_waits(directory: Path) -> None:
    if dist.get_rank() == 1:
        child = subprocess.Popen(["sleep", "100"])
        (directory / "1.pid").write_text(str(child.pid))
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


@pytest.mark.distributed
def test_a_killed_rank_is_the_cause(tmp_path: Path) -> None:
    """Not the connection that another one lost by it; and what the killed rank had started ends with it."""
    with pytest.raises(launch.RankFailure, match=r"^rank 1 on .* failed first: it was ended by SIGKILL"):
        launch.run(_die_while_the_other_waits, TWO_RANKS, (tmp_path,))
    (child,) = pids(tmp_path)
    wait_until(lambda: not alive(child))


def _hang_on_one() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)
    dist.barrier()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_collective_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is cut by its time limit, the rank that did not come is named, and its log ends with where it was."""
    monkeypatch.setattr(supervisor, "_PRIMARY_SECONDS", 1.0)
    with pytest.raises(launch.RankFailure, match=r"(?s)^rank 0 on .*Timed out waiting 6000ms") as failure:
        launch.run(_hang_on_one, replace(TWO_RANKS, timeout_minutes=0.1), run_directory=tmp_path)
    assert str(failure.value).endswith(
        "No rank reported an error of its own. Still running: rank 1.\n"
        f"The logs of the others end with their stacks: {tmp_path}/logs/rank_1.log"
    )
    stacks = (tmp_path / "logs" / "rank_1.log").read_text()
    assert "most recent call first" in stacks
    assert "in _hang_on_one" in stacks


def _talk() -> None:
    print(f"this is rank {dist.get_rank()}")
    print(f"a warning of rank {dist.get_rank()}", file=sys.stderr)


@pytest.mark.distributed
def test_what_ranks_print(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 0's output and errors are shown as such; everything is in the logs, one attempt after the other."""
    for _ in range(2):
        launch.run(_talk, TWO_RANKS, run_directory=tmp_path)
        shown = capfd.readouterr()
        assert shown.out.splitlines()[-1] == "this is rank 0"
        assert shown.err.splitlines()[-1] == "a warning of rank 0"
        assert "rank 1" not in shown.out + shown.err
    for rank in range(2):
        lines = (tmp_path / "logs" / f"rank_{rank}.log").read_text().splitlines()
        assert len([line for line in lines if line.startswith("--- ") and f" rank {rank} of 2, " in line]) == 2
        assert lines.count(f"this is rank {rank}") == lines.count(f"a warning of rank {rank}") == 2


@pytest.mark.distributed
def test_logs_without_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in a temporary directory, which stays only if a rank fails of something else than its input."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    launch.run(_talk, TWO_RANKS)
    with pytest.raises(ValueError, match="the first line"):
        launch.run(_fail_on_one, TWO_RANKS, ("ValueError",))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(launch.RankFailure):
        launch.run(_fail_on_one, TWO_RANKS, ("RuntimeError",))
    (logs,) = tmp_path.iterdir()
    assert "RuntimeError: the first line" in (logs / "rank_1.log").read_text()


def test_a_time_out_of_nccl(tmp_path: Path) -> None:
    """The watchdog's line is shown, which names the collective; nothing where there is none."""
    log = tmp_path / "rank_3.log"
    assert supervisor.nccl_timeout_message(log) == ""
    line = "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, Timeout(ms)=1)"
    log.write_text(f"step 1\n{line}\nabort\n")
    assert supervisor.nccl_timeout_message(log).splitlines()[0] == line
    log.write_text("step 1\n")
    assert supervisor.nccl_timeout_message(log) == ""


def test_a_supervisor_is_light() -> None:
    """The command and its supervisor start without torch and Megatron, of which every task would load a copy."""
    code = "import sys; from megatron_fipo import cli, launch; print({'torch', 'megatron', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.slow
@pytest.mark.distributed
def test_no_rank_outlives_a_killed_command(tmp_path: Path) -> None:
    """The ranks of a command that was killed outright end, too."""
    with command(sleep, tmp_path) as process:
        ranks = await_pids(tmp_path, process)
        assert all(map(alive, ranks))
        process.kill()
        wait_until(lambda: not any(map(alive, ranks)))


def test_under_torchrun_this_process_is_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With RANK and WORLD_SIZE set nothing is started, whatever `world_size` says, and the group is closed again."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    for name, value in {**variables, "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    try:
        launch.run(_record, TWO_RANKS, (tmp_path,))
    finally:
        torch.set_num_threads(threads)
    (found,) = _recorded(tmp_path)
    assert (found["pid"], found["rank"], found["world"]) == (os.getpid(), 0, 1)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "0"}, True),
        ({"RANK": "1"}, False),
        ({"SLURM_PROCID": "5"}, False),
        ({"SLURM_PROCID": "0"}, True),
    ],
)
def test_first_process(environment: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's only process, or rank 0."""
    monkeypatch.setattr(os, "environ", dict(environment))
    assert launch.is_first_process() is first
