"""Decision whether a job is requeued, from the records of its attempts.

An attempt is starting until its ranks have resumed (`running`), so that a node that does not come up is not taken for a
step that fails. Three strikes: the same thing three times in a row ends the job.

- starting: three attempts in a row failed before they were running.
- running: the last three attempts that failed while they were running had come equally far.
- expired: the time limit ended three attempts in a row before a checkpoint of a later step was whole.

Bad input and errors of the program are final at once. An interruption, with everything in a checkpoint, never counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_fipo.launch.attempts import Record
from megatron_fipo.launch.slurm import Job

STRIKES = 3
_MOST_EXCLUDED = 4  # nodes: more than that are not at fault at the same time
_ENDS = ("failed", "expired", "interrupted", "finished")


@dataclass(frozen=True)
class Decision:
    """Decision on a job.

    Attributes:
        refusal: why it is left alone; None: it is requeued.
        exclude: nodes that the next attempt had better avoid.
    """

    refusal: str | None
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """An attempt that has ended.

    Attributes:
        resumed: how far the run had come when its ranks were running; None: they never were.
        end: its first record of an end, since two ranks may fail at once.
    """

    resumed: int | None
    end: Record


def decide(records: Sequence[Record], job: Job | None, max_requeues: int) -> Decision:
    """Return what becomes of a job whose attempt has just ended; `records` ends with the record of that."""
    last = records[-1]
    if job is None:
        return Decision("it is no Slurm job")
    if job.restarts >= max_requeues:
        return Decision(f"it was requeued {job.restarts} times and resume.max_requeues is {max_requeues}")
    if last.event == "failed" and last.kind in ("input", "program"):
        return Decision("the same would happen again")
    return Decision(None, _nodes_to_avoid(records)) if (loop := crash_loop(records)) is None else Decision(loop)


def crash_loop(records: Sequence[Record]) -> str | None:
    """Return what keeps happening to the job of the last record, with its causes; None if it may go on."""
    ended = outcomes(records)
    starting = _last_in_a_row(ended, lambda o: o.end.event == "failed" and o.resumed is None)
    if len(starting) == STRIKES:
        return _with_causes(f"it failed {STRIKES} times in a row before its ranks were running", starting)
    running = [o for o in ended if o.end.event == "failed" and o.resumed is not None][-STRIKES:]
    if ended and ended[-1] in running and len(running) == STRIKES and len({o.end.step for o in running}) == 1:
        return _with_causes(f"it failed {STRIKES} times {running[-1].end.where}", running)
    expired = _last_in_a_row(ended, lambda o: o.end.event == "expired")
    if len(expired) == STRIKES and len({o.resumed for o in expired}) == 1:
        return (
            f"its time limit came {STRIKES} times in a row before a checkpoint was whole: ask for more --time, for an "
            "earlier --signal, or lower checkpoint.every"
        )
    return None


def outcomes(records: Sequence[Record]) -> list[Outcome]:
    """Return the ended attempts of the last record's job, in order."""
    resumed: dict[tuple[int, str], int] = {}
    ends: dict[tuple[int, str], Record] = {}
    for r in records:
        if r.job != records[-1].job:
            continue
        if r.event == "running":
            resumed.setdefault((r.restarts, r.launch), r.step)
        elif r.event in _ENDS:
            ends.setdefault((r.restarts, r.launch), r)
    return [Outcome(resumed.get(attempt), end) for attempt, end in ends.items()]


def has_run_before(records: Sequence[Record], job: Job | None) -> bool:
    """Return whether an earlier attempt of the job was running: its input was in order then."""
    return job is not None and any(
        r.event == "running" and r.job == job.number and r.restarts < job.restarts for r in records
    )


def _nodes_to_avoid(records: Sequence[Record]) -> tuple[str, ...]:
    """Return the nodes to blame for this failure, unless too many were blamed before."""
    if records[-1].event != "failed" or records[-1].kind != "machine":
        return ()
    blamed = [name for r in records if r.job == records[-1].job for name in r.blamed]
    return tuple(records[-1].blamed) if len(set(blamed)) <= _MOST_EXCLUDED else ()


def _last_in_a_row(ended: Sequence[Outcome], is_one: Callable[[Outcome], bool]) -> list[Outcome]:
    """Return the last outcomes, at most `STRIKES`, all of which are such."""
    row: list[Outcome] = []
    for outcome in reversed(ended):
        if not is_one(outcome) or len(row) == STRIKES:
            break
        row.insert(0, outcome)
    return row


def _with_causes(text: str, ended: Sequence[Outcome]) -> str:
    return "\n".join([f"{text}:", *(f"  - {o.end.time}: {o.end.cause}" for o in ended)])
