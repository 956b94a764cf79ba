"""One supervisor a task: failures, requests to stop and the way back into the queue, without a Slurm.

`scontrol` is a script that answers as it is told and notes how it was called.
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_fipo import launch
from megatron_fipo.exit_codes import note_running
from megatron_fipo.launch import attempts
from megatron_fipo.launch.attempts import Record
from megatron_fipo.launch.failure import Kind
from megatron_fipo.machine.host import host
from tests.support.processes import alive, await_pids, note_pid, pids, sleep, srun, stop_when_asked
from tests.support.waiting import wait_until

pytestmark = pytest.mark.distributed

RUNNING = "JobId=7 JobName=fipo JobState=RUNNING Reason=None Requeue=1 Restarts=0 BatchFlag=1"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with `scontrol`, alone on the PATH; what it says of the job is in `job`, its calls in `calls`."""
    directory = tmp_path / "slurm"
    directory.mkdir()
    (directory / "job").write_text(RUNNING)
    scontrol = directory / "scontrol"
    scontrol.write_text(
        f'#!/bin/sh\necho "$@" >> {directory}/calls\n/bin/sleep 0.5\n'
        f'if [ "$1 $2" = "show job" ]; then /bin/cat {directory}/job; fi\n'
        'if [ "$1" = requeue ]; then kill -TERM $PPID; fi\n'  # Slurm's signal comes before its answer
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))
    return directory


def _requeues(slurm: Path) -> int:
    calls = slurm / "calls"
    return calls.read_text().splitlines().count("requeue 7") if calls.exists() else 0


def _events(directory: Path) -> list[tuple[str, str]]:
    return [(r.event, r.host) for r in attempts.read(directory / "run" / "attempts.jsonl")]


def _wait_for_peer() -> None:
    dist.barrier()
    time.sleep(600)


def _raise_on_one(directory: Path) -> None:
    note_pid(directory)
    if dist.get_rank() == 1:
        raise RuntimeError("boom")
    dist.barrier()


def test_the_cause_and_nothing_else(slurm: Path, tmp_path: Path) -> None:
    """The failed rank's supervisor shows its traceback and does not requeue what would fail again; the other, whose
    rank only lost its peer, adds nothing."""
    with srun(_raise_on_one, tmp_path) as (other, failed):
        await_pids(tmp_path)
        code, output = failed.end()
        assert code == 1
        assert output.startswith("rank 1 on node1 failed first: RuntimeError: boom\nTraceback")
        assert output.splitlines()[-1] == "job 7 is not requeued: it would fail the same way again"
        code, output = other.end()
        assert (code, [line for line in output.splitlines() if "preflight" not in line]) == (1, [])
    assert not any(map(alive, pids(tmp_path)))
    assert _events(tmp_path) == [("start", "node0"), ("failed", "node1")]
    assert _requeues(slurm) == 0


def _refuse_on_one(directory: Path) -> None:
    note_pid(directory)
    if dist.get_rank() == 1:
        raise ValueError("the lock is another's")
    dist.barrier()


def test_the_exit_code_is_that_of_the_cause(slurm: Path, tmp_path: Path) -> None:
    """On all tasks, in whatever order they end, and though srun ends the others when one has: srun's is one of them."""
    with srun(_refuse_on_one, tmp_path) as supervisors:
        wait_until(lambda: ("failed", "node1") in _events(tmp_path))
        while any(s.process.is_alive() for s in supervisors):
            for supervisor in supervisors:
                if supervisor.process.is_alive():
                    os.kill(supervisor.process.pid, signal.SIGTERM)
            time.sleep(0.01)
        assert [s.end()[0] for s in supervisors] == [2, 2]
        assert supervisors[1].end()[1].startswith("error: the lock is another's\n")


def _killed_on_one(directory: Path) -> None:
    note_pid(directory)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    _wait_for_peer()


def test_a_lost_process_is_worth_another_attempt(slurm: Path, tmp_path: Path) -> None:
    """Whoever saw it first requeues the job, once; what the other rank was doing is in its log."""
    with srun(_killed_on_one, tmp_path) as supervisors:
        (_, _), (code, output) = (s.end() for s in supervisors)
    assert code == 75
    assert output.startswith("rank 1 on node1 failed first: it was ended by SIGKILL")
    assert output.splitlines()[-1] == "job 7 is requeued"
    assert _requeues(slurm) == 1
    assert "in _killed_on_one" in (tmp_path / "run" / "logs" / "rank_0.log").read_text()


@pytest.mark.slow
def test_a_lost_node(slurm: Path, tmp_path: Path) -> None:
    """Nobody is left to say why: after a while the lost connection itself is the cause, and the job is requeued."""
    with srun(stop_when_asked, tmp_path) as (left, lost):
        await_pids(tmp_path)
        lost.process.kill()
        code, output = left.end()
    assert code == 75
    assert "rank 0 on node0 failed first: RuntimeError: " in output
    assert "Connection" in output
    assert _requeues(slurm) == 1


@pytest.mark.parametrize(
    ("state", "says", "requeues"),
    [
        ("JobState=RUNNING Reason=None BatchFlag=1", "job 7 is requeued", 1),
        ("JobState=COMPLETING Reason=TimeLimit BatchFlag=1", "job 7 is requeued", 1),
        ("JobState=COMPLETING Reason=None BatchFlag=1", "job 7 is not requeued: its state is COMPLETING", 0),  # scancel
        ("JobState=RUNNING Reason=None BatchFlag=0", "job 7 is not requeued: it is not a batch job", 0),
    ],
)
def test_an_interrupted_job(state: str, says: str, requeues: int, slurm: Path, tmp_path: Path) -> None:
    """Rank 0's supervisor puts a running job back into the queue, and leaves one alone that was cancelled; the others
    end after that, since Slurm may end all when one has. All exit codes are 75."""
    (slurm / "job").write_text(f"JobId=7 {state}")
    with srun(stop_when_asked, tmp_path) as supervisors:
        await_pids(tmp_path)
        for supervisor in supervisors:
            os.kill(supervisor.process.pid, signal.SIGUSR1)
        other, _ = supervisors[1].end()
        assert _events(tmp_path)[-1] == ("interrupted", "node0")
        code, output = supervisors[0].end()
    assert (code, other) == (75, 75)
    assert output.splitlines()[-1] == f"interrupted in step 1: {says}"
    assert _requeues(slurm) == requeues
    assert [event for event, _ in _events(tmp_path)] == ["start", "signalled", "interrupted"]


def test_without_scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And without a batch script that requeues the job: there is a warning at the start, the message says what to do,
    and the exit code is 75 all the same."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with srun(stop_when_asked, tmp_path) as supervisors:
        await_pids(tmp_path)
        os.kill(supervisors[1].process.pid, signal.SIGTERM)
        codes = [s.end() for s in supervisors]
    assert [code for code, _ in codes] == [75, 75]
    assert codes[0][1].startswith("warning: job 7 will not be requeued: there is no scontrol here")
    assert "there is no scontrol here: run `scontrol requeue 7` or submit it again" in codes[0][1]
    assert "warning" not in codes[1][1]


def test_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch script is asked to requeue the job, once the ranks have stopped; there is no warning."""
    monkeypatch.setenv("PATH", str(tmp_path))
    marker = tmp_path / "marker"
    with srun(stop_when_asked, tmp_path, MEGATRON_FIPO_REQUEUE=str(marker)) as supervisors:
        await_pids(tmp_path)
        assert not marker.exists()
        os.kill(supervisors[1].process.pid, signal.SIGTERM)
        codes = [s.end() for s in supervisors]
    assert [code for code, _ in codes] == [75, 75]
    assert codes[0][1].splitlines()[-1] == "interrupted in step 1: job 7 is requeued by its batch script"
    assert "warning" not in codes[0][1]
    assert marker.exists()


def _save_too_slowly(directory: Path) -> None:
    """A rank that is running, and whose checkpoint takes for ever."""
    note_running()
    sleep(directory)


@pytest.mark.parametrize("known", [True, False], ids=["known", "asked"])
def test_a_save_that_is_too_slow_for_the_time_limit(known: bool, slurm: Path, tmp_path: Path) -> None:
    """The first rank's supervisor requeues the job in the last 45 seconds, whatever the ranks are doing, and ends its
    rank; the time that Slurm says now counts, not that of the start, of which Slurm before 23.02 tells nothing."""
    (slurm / "job").write_text(f"{RUNNING} EndTime={datetime.fromtimestamp(time.time() + 30).isoformat()}")
    end = {"SLURM_JOB_END_TIME": str(int(time.time()) + 50)} if known else {}
    with srun(_save_too_slowly, tmp_path, **end) as (first, other):
        code, output = first.end()
        assert code == 75
        os.kill(other.process.pid, signal.SIGKILL)
    assert output.splitlines()[-1] == (
        "stopped by its time limit before a checkpoint was complete in step 1: job 7 is requeued"
    )
    assert [event for event, _ in _events(tmp_path) if event != "running"] == ["start", "expired"]
    assert _requeues(slurm) == 1


def test_ranks_that_have_resumed(slurm: Path, tmp_path: Path) -> None:
    """They tell their supervisors, and the first of those records it: what fails later is no failed start."""
    with srun(_save_too_slowly, tmp_path) as supervisors:
        wait_until(lambda: ("running", "node0") in _events(tmp_path))
        for supervisor in supervisors:
            os.kill(supervisor.process.pid, signal.SIGKILL)
    assert [event for event, _ in _events(tmp_path)] == ["start", "running"]


def test_a_time_limit_that_was_raised(slurm: Path, tmp_path: Path) -> None:
    """A job that an administrator gave more time goes on."""
    (slurm / "job").write_text(f"{RUNNING} EndTime={datetime.fromtimestamp(time.time() + 9000).isoformat()}")
    with srun(_say_where, tmp_path, SLURM_JOB_END_TIME=str(int(time.time()))) as supervisors:
        assert [s.end()[0] for s in supervisors] == [0, 0]
    assert _requeues(slurm) == 0


def test_a_node_that_comes_back_without_the_model(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Input that was there in an earlier attempt and is gone is not a user error: the job is requeued. In a first
    attempt it is a user error."""
    run = tmp_path / "run"
    monkeypatch.setattr(os, "environ", {**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"})
    with pytest.raises(ValueError, match="the model is not there"), launch.checked(run, 3):
        raise ValueError("the model is not there")
    _earlier(tmp_path, Record("start", 1, "7"), Record("running", 1, "7"), Record("interrupted", 4, "7"))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the script that is scontrol signals its caller
    try:
        with pytest.raises(launch.RankFailure, match="the model is not there") as error, launch.checked(run, 3):
            raise ValueError("the model is not there")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert error.value.exit_code == 75
    assert _requeues(slurm) == 1
    last = attempts.read(run / "attempts.jsonl")[-1]
    assert (last.event, last.kind, last.blamed) == ("failed", "machine", [host()])


def _earlier(directory: Path, *records: Record) -> None:
    for record in records:
        attempts.append(directory / "run" / "attempts.jsonl", record)


def _failed(restarts: int) -> list[Record]:
    return [Record("start", 1, "7", restarts), Record("failed", 1, "7", restarts, cause="lost node5", kind="machine")]


def test_a_third_failure(slurm: Path, tmp_path: Path) -> None:
    """The job is not requeued again, exit code 1."""
    _earlier(tmp_path, *_failed(0), *_failed(1))
    with srun(_killed_on_one, tmp_path, SLURM_RESTART_COUNT="2") as supervisors:
        code, output = supervisors[1].end()
    assert code == 1
    assert "job 7 is not requeued: it failed 3 times in a row before its ranks were running:\n" in output
    assert ": lost node5\n" in output
    assert _requeues(slurm) == 0


def test_a_fourth_attempt_is_refused(slurm: Path, tmp_path: Path) -> None:
    """Slurm itself requeues a job whose node died; after three such ends no rank is started."""
    _earlier(tmp_path, *_failed(0), *_failed(1), Record("start", 1, "7", 2))
    with srun(sleep, tmp_path, SLURM_RESTART_COUNT="3") as supervisors:
        (code, output), (other, quiet) = (s.end() for s in supervisors)
    assert (code, other, quiet) == (1, 1, "")
    assert output.startswith("job 7 does not continue: it failed 3 times in a row before its ranks were running:\n")
    assert pids(tmp_path) == []


def test_a_job_submitted_anew_counts_anew(slurm: Path, tmp_path: Path) -> None:
    """Failures of other jobs in the same step do not matter."""
    _earlier(tmp_path, *(Record("failed", 1, "6", restarts) for restarts in range(2)))
    with srun(_killed_on_one, tmp_path) as supervisors:
        assert supervisors[1].end()[0] == 75


@pytest.mark.parametrize(("kind", "code"), [("program", 1), ("input", 2)])
def test_a_failure_elsewhere_ends_a_rank_at_once(kind: Kind, code: int, slurm: Path, tmp_path: Path) -> None:
    """The record of a failure of this attempt is enough, whatever the rank is waiting for; exit codes are the same."""
    with srun(sleep, tmp_path) as supervisors:
        await_pids(tmp_path)
        attempts.append(tmp_path / "run" / "attempts.jsonl", Record("failed", 1, "7", launch="0", kind=kind))
        assert [s.end()[0] for s in supervisors] == [code, code]
    assert not any(map(alive, pids(tmp_path)))


def _say_where(directory: Path) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    found = {name: os.environ[name] for name in names} | {"rank": dist.get_rank(), "world": dist.get_world_size()}
    (directory / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    print(f"this is rank {dist.get_rank()}")


def test_ranks_find_each_other(slurm: Path, tmp_path: Path) -> None:
    """From srun's variables alone; rank 0's output is shown, and everybody's is in its log, under a line that names
    the attempt."""
    with srun(_say_where, tmp_path) as supervisors:
        assert [s.end()[0] for s in supervisors] == [0, 0]
        shown = [s.output.read_text().splitlines() for s in supervisors]
    assert shown[0][0].startswith("preflight: 2 ranks on 2 nodes ok (")
    assert (shown[0][1:], shown[1]) == (["this is rank 0"], [])
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (found["RANK"], found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == (f"{rank}", "0", "1")
        assert (found["rank"], found["world"]) == (rank, 2)
        log = (tmp_path / "run" / "logs" / f"rank_{rank}.log").read_text().splitlines()
        assert f"rank {rank} of 2, job 7, restart 0, node{rank}, pid " in log[0]
        assert log[-1] == f"this is rank {rank}"
    assert [asdict(r)["event"] for r in attempts.read(tmp_path / "run" / "attempts.jsonl")] == ["start", "finished"]


def test_as_many_tasks_as_ranks(slurm: Path, tmp_path: Path) -> None:
    """The configuration's number of ranks is compared with the tasks that were started, before any rank is."""
    with srun(sleep, tmp_path, SLURM_STEP_NUM_TASKS="3") as supervisors:
        code, output = supervisors[0].end()
    assert code == 2
    assert output == (
        "error: tp 1 x pp 1 x cp 1 x dp 2 = 2 ranks, but srun started 3 tasks: set parallel.world_size=3, or ask for "
        "other --nodes and --ntasks-per-node\n"
    )
