"""slurm/eval.sh as it stands, on a real Slurm: the figures of an evaluation without it, whatever happens to the job."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest

from megatron_fipo.config import Config, to_yaml
from megatron_fipo.evaluation import command
from tests.slurm.cluster import ROOT, Cluster, Job
from tests.slurm.conftest import SECONDS
from tests.support.policies import make_config
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

K, PROBLEMS, CHUNK, RANKS = 6, 8, 4, 2
BEFORE_FAULT = 2 * CHUNK * RANKS  # samples that are kept when all ranks are at their third chunks


class Evaluation(NamedTuple):
    """A job, and the directory of what it finishes."""

    job: Job
    out: Path

    @property
    def counts(self) -> Path:
        return self.out.with_suffix(".counts")

    def judged(self) -> dict[int, int]:
        """Responses that were drawn and judged in each attempt."""
        found: Counter[int] = Counter()
        for line in self.counts.read_text().splitlines():
            attempt, number = map(int, line.split())
            found[attempt] += number
        return dict(found)

    def await_fault(self, attempt: int = 0) -> None:
        """Until all ranks are in the chunk that the fault is in."""
        deadline, marks = time.monotonic() + SECONDS, [self.out / f"waiting_{rank}" for rank in range(RANKS)]
        while not all(mark.exists() and mark.read_text() == str(attempt) for mark in marks):
            assert time.monotonic() < deadline, self.job.output()
            time.sleep(0.1)


Evaluate = Callable[..., Evaluation]


@pytest.fixture(scope="module")
def evaluate(cluster: Cluster, task: Path) -> Iterator[Evaluate]:
    """evaluate(out, reward, *options): slurm/eval.sh on two tasks of one node.

    Jobs that have not ended when the tests have are cancelled.
    """
    jobs: list[Job] = []

    def submit(out: Path, reward: str, *options: str) -> Evaluation:
        config = out.with_suffix(".yaml")
        config.write_text(to_yaml(_config(task, reward)))
        job = cluster.submit(
            *("slurm/eval.sh", config, "--out", out),
            log=out.with_suffix(".log"),
            options=[f"--ntasks-per-node={RANKS}", *options],
            PYTHONPATH=str(ROOT),
            FIPO_TEST_RUN=str(out),
            FIPO_TEST_COUNTS=str(out.with_suffix(".counts")),
        )
        jobs.append(job)
        return Evaluation(job, out)

    yield submit
    for job in jobs:
        job.cancel()


@pytest.fixture(scope="module")
def undisturbed(task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the same evaluation on two local ranks, without Slurm."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run_ranks(command.run, RANKS, _config(task, "parity"), out)
    return out


def _config(task: Path, reward: str) -> Config:
    return make_config(
        task,
        parallel={"world_size": RANKS, "timeout_minutes": 5.0, "threads_per_rank": 1},
        data={"train": "unused", "validation": f"{task}/validation.parquet", "max_prompt_tokens": 16},
        rollout={"max_response_tokens": 12, "batch_size": CHUNK},
        reward={"function": f"tests.slurm.faults:{reward}", "overlong_buffer_tokens": 0},
        eval={"samples": K, "max_problems": PROBLEMS, "top_p": 1.0},
    )


def _result(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Figures, a row a problem, and a row a sample, in full."""
    tables = (pq.read_table(out / f"{name}.parquet").to_pylist() for name in ("problems", "samples"))
    return json.loads((out / "summary.json").read_text()), *tables


def test_evaluates(evaluate: Evaluate, undisturbed: Path, tmp_path: Path) -> None:
    """Samples and figures are those of two local ranks, bit for bit; a line of the job's output has the figures."""
    evaluation = evaluate(tmp_path / "out", "parity")
    ended = evaluation.job.wait(seconds=SECONDS)
    output = evaluation.job.output()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "0"), output
    assert evaluation.judged() == {0: K * PROBLEMS}
    assert _result(evaluation.out) == _result(undisturbed)
    # srun passes both streams on; the last progress on standard error may come behind the last line of standard output.
    (told,) = (json.loads(line) for line in output.splitlines() if line.startswith("{"))
    assert 0.2 < told["avg@k"] < 0.8
    assert told.items() >= _result(undisturbed)[0].items()


def test_node_failures(evaluate: Evaluate, cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    """Its node is gone in the middle, twice: the job is started again on one that is there, draws what was not
    finished and no more, and ends as if nothing had been. Since it came further meanwhile, that is no crash loop."""
    evaluation = evaluate(tmp_path / "out", "waits_for_crashes")
    for attempt in range(2):
        evaluation.await_fault(attempt)
        (node,) = evaluation.job.nodes()
        cluster.crash(node)
        try:
            evaluation.job.wait(("RUNNING", "COMPLETED", "FAILED"), seconds=SECONDS, restarts=attempt + 1)
        finally:
            cluster.boot(node)
    ended = evaluation.job.wait(seconds=SECONDS)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), evaluation.job.output()
    assert evaluation.judged() == {0: BEFORE_FAULT, 1: BEFORE_FAULT, 2: K * PROBLEMS - 2 * BEFORE_FAULT}
    assert _result(evaluation.out) == _result(undisturbed)


def test_time_limit(evaluate: Evaluate, undisturbed: Path, tmp_path: Path) -> None:
    """Signalled by the script's own --signal in the middle of a chunk, a job keeps that chunk, too, goes back into the
    queue by itself, and draws the others: none twice, and the result is that of an undisturbed one, bit for bit."""
    limited = evaluate(tmp_path / "out", "waits_for_signal")
    limited.await_fault()
    job = limited.job
    job.expire(minutes=3, seconds=SECONDS)
    ended = job.wait(seconds=SECONDS)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.output()
    kept = BEFORE_FAULT + RANKS * CHUNK
    assert limited.judged() == {0: kept, 1: K * PROBLEMS - kept}
    assert f"job {job.number} is requeued" in job.output()
    assert f"{kept} of {K * PROBLEMS} samples are already finished" in job.output()
    assert _result(limited.out) == _result(undisturbed)
