"""Which jobs are requeued: machine trouble goes on, three strikes end it, each kind of trouble by itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.launch import requeue
from megatron_fipo.launch.attempts import Event, Progress, Record
from megatron_fipo.launch.failure import Kind
from megatron_fipo.launch.requeue import Decision, decide
from megatron_fipo.launch.slurm import Job

JOB = Job("7", restarts=2)


def _record(event: Event, step: int, restarts: int, job: str = "7", **more: Any) -> Record:
    return Record(event, step, job, restarts, launch="0", **more)


def _attempt(
    restarts: int, step: int, *, resumed: int | None = None, event: Event = "failed", **more: Any
) -> list[Record]:
    """An attempt that ended in a step; `resumed`: the step that it was running from, None: it never was."""
    running = [] if resumed is None else [_record("running", resumed, restarts)]
    more = {"kind": "machine", **more} if event == "failed" else more
    return [_record("start", step, restarts), *running, _record(event, step, restarts, **more)]


def _refusal(*attempts: list[Record], job: Job = JOB) -> str | None:
    refusal = decide([record for attempt in attempts for record in attempt], job, max_requeues=10).refusal
    return refusal.splitlines()[0] if refusal else None


@pytest.mark.parametrize(
    ("kind", "refusal"),
    [
        ("machine", None),
        ("connection", None),
        ("program", "it would fail the same way again"),
        ("input", "it would fail the same way again"),
    ],
)
def test_kinds_of_failures(kind: Kind, refusal: str | None) -> None:
    """Machine trouble goes on; bad input and errors of the program are final at once."""
    assert _refusal(_attempt(2, 5, resumed=1, kind=kind)) == refusal


def test_three_strikes_in_a_step() -> None:
    """Two failures in the same step are chance, three are not; in other steps they do not count."""
    attempts = [_attempt(r, 5, resumed=3) for r in range(3)]
    assert _refusal(*attempts[:2]) is None
    assert _refusal(*attempts) == "it failed 3 times in step 5:"
    assert _refusal(_attempt(0, 4, resumed=3), *attempts[1:]) is None


def test_an_interruption_between_failures() -> None:
    """It is no way out of a loop: the step fails whenever it comes."""
    failures = [_attempt(r, 5, resumed=3) for r in range(3)]
    interrupted = _attempt(3, 5, resumed=3, event="interrupted")
    assert _refusal(*failures[:2], interrupted, _attempt(4, 5, resumed=5)) == "it failed 3 times in step 5:"
    assert _refusal(*failures[:2], interrupted) is None


def test_starts_are_counted_apart() -> None:
    """A start that fails after a failed step is no second strike of that step; three starts in a row are enough."""
    starts = [_attempt(r, 5) for r in range(1, 4)]
    assert _refusal(_attempt(0, 5, resumed=3), starts[0], starts[1]) is None
    assert _refusal(_attempt(0, 5, resumed=3), *starts) == "it failed 3 times in a row before its ranks were running:"
    running = _attempt(4, 5, resumed=3)
    assert _refusal(_attempt(0, 5, resumed=3), *starts[:2], running) is None


def test_a_checkpoint_that_is_too_slow() -> None:
    """The time limit comes three times before a later step is in a checkpoint: one sentence says what to change. As
    long as runs resume from later steps, jobs go on."""
    stuck = [_attempt(r, 41 + r % 2, resumed=1, event="expired") for r in range(3)]
    assert _refusal(*stuck[:2]) is None
    refusal = _refusal(*stuck)
    assert refusal is not None
    assert refusal.startswith(
        "its time limit came 3 times in a row before a checkpoint was complete: ask for more --time"
    )
    assert _refusal(*[_attempt(r, 41, resumed=1 + 10 * r, event="expired") for r in range(3)]) is None


def test_ranks_that_fail_at_once() -> None:
    """A failure that the supervisors of two nodes both recorded is one failed attempt."""
    twice = [_record("failed", 5, 2, kind="machine"), _record("failed", 5, 2, kind="machine")]
    assert requeue.crash_loop([*_attempt(1, 5, resumed=3), _record("running", 3, 2), *twice]) is None


def test_all_causes_are_told() -> None:
    """Each with its time."""
    attempts = [_attempt(r, 5, resumed=3, cause=f"cause {r}", time=f"time {r}") for r in range(4)]
    loop = requeue.crash_loop([record for attempt in attempts for record in attempt])
    assert loop == "it failed 3 times in step 5:\n  - time 1: cause 1\n  - time 2: cause 2\n  - time 3: cause 3"


def test_other_jobs_do_not_count() -> None:
    """A job that is submitted anew counts anew."""
    others = [_record("failed", 5, r, job="6", kind="machine") for r in range(5)]
    assert _refusal(others, _attempt(0, 5)) is None


def test_an_evaluation_that_comes_further_is_in_no_loop() -> None:
    """Failures count where no sample was finished between them."""
    failures = [_attempt(r, 16 * (r + 1), resumed=0, unit="samples") for r in range(3)]
    assert _refusal(*failures) is None
    stuck = [_attempt(r, 32, resumed=32, unit="samples") for r in range(3)]
    assert _refusal(*stuck) == "it failed 3 times after 32 samples:"


@pytest.mark.parametrize(
    ("job", "refusal"),
    [
        (None, "it is not a Slurm job"),
        (Job("7", restarts=3), "it was requeued 3 times and resume.max_requeues is 3"),
        (Job("7", restarts=2), None),
    ],
)
def test_an_interrupted_job(job: Job | None, refusal: str | None) -> None:
    """However often in the same step, up to resume.max_requeues times."""
    records = [_record("interrupted", 5, r) for r in range(3)]
    assert decide(records, job, max_requeues=3).refusal == refusal


def test_nodes_to_blame_are_avoided() -> None:
    """The nodes of this failure are avoided, unless four others were blamed before: then it is not the nodes."""
    assert decide(_attempt(0, 5, resumed=3, blamed=["n7"]), JOB, 10) == Decision(None, ("n7",))
    lost_peer = _attempt(0, 5, resumed=3, kind="connection", blamed=[])
    assert decide(lost_peer, JOB, 10) == Decision(None)
    earlier = [record for r in range(4) for record in _attempt(r, r, resumed=0, blamed=[f"n{r}"])]
    assert decide([*earlier, *_attempt(4, 9, resumed=0, blamed=["n9"])], JOB, 10) == Decision(None)


def test_input_that_was_in_order_before() -> None:
    """Only an earlier attempt of the same job that was running shows that."""
    running = [_record("start", 1, 0), _record("running", 1, 0)]
    assert requeue.has_run_before(running, JOB)
    assert not requeue.has_run_before(running[:1], JOB)
    assert not requeue.has_run_before(running, Job("8", restarts=2))
    assert not requeue.has_run_before(running, Job("7", restarts=0))
    assert not requeue.has_run_before(running, None)


@pytest.mark.parametrize(("seconds", "expires"), [(30, True), (None, False)], ids=["lowered", "no_answer"])
def test_a_time_limit_that_was_lowered(
    seconds: float | None, expires: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm is asked for the end again after its signal, not while the signal is on its way to the ranks; without an
    answer the end that the job began with holds."""
    now, asked = time.time(), []

    def current_end(job: Job) -> float | None:
        asked.append(job.number)
        return None if seconds is None else now + seconds

    monkeypatch.setattr(Job, "current_end", current_end)
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now) + 3600))
    attempt = requeue.Attempt(tmp_path, 1, first=True, alone=True, progress=lambda: Progress(0))
    assert not attempt.is_expiring()
    attempt.signalled()
    assert asked == []
    assert attempt.is_expiring() is expires
    assert asked
