"""Ranks start with the right names, end together, and say what went wrong in the words of the rank that failed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_fipo import launch
from tests.launch.processes import TWO_RANKS, alive, command, free_port, pids, poll, sleep


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


@pytest.mark.distributed
def test_no_rank_outlives_a_killed_command(tmp_path: Path) -> None:
    """The ranks of a command that was killed outright end, too."""
    with command(sleep, tmp_path) as process:
        assert poll(lambda: len(pids(tmp_path)) == 2, 90)
        ranks = pids(tmp_path)
        assert all(map(alive, ranks))
        process.kill()
        assert poll(lambda: not any(map(alive, ranks)), 20)


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
