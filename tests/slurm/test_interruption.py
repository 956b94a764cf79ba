"""Jobs that Slurm stops, nodes that fail, ranks that die: a run goes on by itself, where it should."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import SECONDS, Train, await_fault, learned

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
def test_node_failure(
    which: int, undisturbed: list[dict[str, float]], train: Train, cluster: Cluster, tmp_path: Path
) -> None:
    """A node is gone in the middle of a step, the one with rank 0 and the batch script or the other: the job is
    started again on nodes that are there, and ends with the metrics of a run that nothing disturbed."""
    job = train(tmp_path / "run", "waits_for_crash")
    await_fault(tmp_path / "run", job)
    node = job.nodes()[which]
    cluster.crash(node)
    try:
        ended = job.wait(seconds=SECONDS, restarts=1)
    finally:
        cluster.boot(node)
    assert ended["JobState"] == "COMPLETED", job.output()
    assert "resuming after step" in job.output()
    assert learned(tmp_path / "run") == undisturbed


def test_preemption(undisturbed: list[dict[str, float]], train: Train, cluster: Cluster, tmp_path: Path) -> None:
    """A job that has to give way makes a checkpoint and goes at once, not at the end of its grace time of 5 minutes;
    it goes on when the nodes are free again."""
    job = train(tmp_path / "run", "waits_for_signal", options=("--partition=preemptible",))
    await_fault(tmp_path / "run", job)
    urgent = cluster.submit(
        *("slurm/convert.sh", "--help"), log=tmp_path / "urgent.log", options=[f"--nodelist={job.nodes()[1]}"]
    )
    assert urgent.wait(seconds=250.0)["JobState"] == "COMPLETED", job.output()
    ended = job.wait(seconds=SECONDS, restarts=1)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.output()
    assert learned(tmp_path / "run") == undisturbed


def test_crash_loop(train: Train, tmp_path: Path) -> None:
    """A rank that is killed is worth two more attempts; killed in the same step again, the job fails and says why."""
    job = train(tmp_path / "run", "kills_rank")
    ended = job.wait(("FAILED", "COMPLETED"), seconds=3 * SECONDS, restarts=2)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "2"), job.output()
    assert "failed 3 times in step 3" in job.output()


def test_cancelled_job_stays_cancelled(train: Train, cluster: Cluster, tmp_path: Path) -> None:
    """scancel's signal makes a checkpoint, as any does, but the job does not come back."""
    job = train(tmp_path / "run", "waits_for_signal")
    await_fault(tmp_path / "run", job)
    nodes = job.nodes()
    job.cancel()
    cluster.wait_for(nodes, ("idle",), SECONDS)  # nothing of the job is left that could ask for another start
    ended = job.read()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), job.output()


def test_time_limit(undisturbed: list[dict[str, float]], train: Train, tmp_path: Path) -> None:
    """Signalled ahead of its time limit, in the middle of a step, a job makes a checkpoint, goes back into the queue
    by itself, and ends with the metrics of a run that nothing disturbed, bit for bit."""
    job = train(tmp_path / "run", "waits_for_signal", options=("--signal=USR1@300",))
    await_fault(tmp_path / "run", job)
    job.expire(minutes=5, seconds=SECONDS)
    ended = job.wait(seconds=SECONDS)
    assert ended["JobState"] == "COMPLETED", job.output()
    assert f"job {job.number} is requeued" in job.output()
    assert learned(tmp_path / "run") == undisturbed
