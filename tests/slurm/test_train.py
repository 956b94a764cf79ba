"""slurm/fipo_32b.sh as it stands, on a real Slurm: a run, jobs in a chain, a program that has an error."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import pytest

from tests.slurm.cluster import OPEN_FILES, Job
from tests.slurm.conftest import SECONDS, Train, learned

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def finished(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    """A job on 2 nodes x 2 ranks that has ended, and its run's directory."""
    run = tmp_path_factory.mktemp("train") / "run"
    job = train(run, "notes_limits", ranks=4)
    job.wait(seconds=SECONDS)
    return job, run


def test_trains(finished: tuple[Job, Path]) -> None:
    """Three steps, a row each; the job has completed in its first attempt."""
    job, run = finished
    ended = job.read()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "0"), job.output()
    assert "4 ranks on 2 nodes" in job.output()
    assert [row["step"] for row in learned(run)] == [1, 2, 3]


def test_every_rank_may_open_files(finished: tuple[Job, Path]) -> None:
    """Jobs start with Slurm's copy of a shell's soft limit; ranks have the hard one."""
    _, run = finished
    for rank in range(4):
        soft, hard = map(int, (run / f"limits_{rank}").read_text().split())
        assert soft == hard > OPEN_FILES


def test_every_rank_has_a_log(finished: tuple[Job, Path]) -> None:
    """rank_0.log to rank_3.log; rank 0's lines are in the job's log, once."""
    job, run = finished
    assert sorted(log.name for log in (run / "logs").iterdir()) == [f"rank_{r}.log" for r in range(4)]
    assert (run / "logs" / "rank_0.log").read_text().count("step 3/3") == 1
    assert job.output().count("step 3/3") == 1


def test_chain_of_jobs_goes_on(finished: tuple[Job, Path], train: Train) -> None:
    """A job after another (afterok), and one after all of its name (singleton): each goes on where the last ended,
    on as many ranks as it has."""
    job, run = finished
    second = train(run, "notes_limits", "trainer.max_steps=4", options=(f"--dependency=afterok:{job.number}",))
    third = train(run, "notes_limits", "trainer.max_steps=5", options=("--dependency=singleton",))
    ended = third.wait(seconds=2 * SECONDS)
    assert ended["JobState"] == "COMPLETED", third.output()
    assert ended["StartTime"] >= second.read()["EndTime"]
    assert [row["step"] for row in learned(run)] == [1, 2, 3, 4, 5]


def test_error_ends_the_chain(train: Train, tmp_path: Path) -> None:
    """An exception in one rank fails the job within 30 seconds (on a busy machine, within half the time that it took to
    get there) and is the first error in its log; since it would happen again, the job is not requeued, and the one that
    waits for its success is cancelled."""
    job = train(tmp_path / "run", "raises")
    waiting = (f"--dependency=afterok:{job.number}", "--kill-on-invalid-dep=yes")
    after = train(tmp_path / "after", "parity", options=waiting)
    ended = job.wait(seconds=SECONDS)
    started, stopped = (datetime.fromisoformat(ended[name]).timestamp() for name in ("StartTime", "EndTime"))
    raised = (tmp_path / "run" / "raised").stat().st_mtime
    assert stopped - raised < max(30.0, (raised - started) / 2)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), job.output()
    errors = [line for line in job.output().splitlines() if re.search("error|traceback|fail", line, re.IGNORECASE)]
    assert re.search("rank 1 on node.* RuntimeError: the reward model has gone", errors[0]), job.output()
    assert after.wait()["JobState"] == "CANCELLED"
