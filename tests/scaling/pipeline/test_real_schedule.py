"""Megatron's own schedules and chunked 1F1B over gloo, on stages that sleep for given times, against the simulator."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_fipo.scaling.pipeline.simulate import Communication, simulate
from megatron_fipo.scaling.pipeline.timeline import Timeline
from megatron_fipo.shapes.schedule import Schedule
from tests.scaling.pipeline.sleeping import Case, profile_sleeping, run_sleeping
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

AGREEMENT = 0.03  # of the step
MICRO_BATCHES = {(2, 1): 6, (4, 1): 8, (2, 2): 4, (4, 2): 8}  # of stages, chunks
LENGTHS = np.array([0.1, 0.3, 0.11, 0.13, 0.26, 0.1, 0.19, 0.12])  # seconds: many short, a few long
UNEQUAL = np.array([0.11, 0.17, 0.1, 0.14, 0.1, 0.13, 0.1, 0.2])
ORDERS = [  # stages, chunks, micro-batches, group size, forward only
    *((p, 1, m, None, f) for p in (2, 4) for m in (1, 2, 6) for f in (False, True)),
    *((2, v, m, g, f) for v, m, g in ((2, 2, None), (2, 6, None), (3, 5, 3)) for f in (False, True)),
    *((4, v, m, g, f) for v, m, g in ((2, 4, None), (2, 8, None), (2, 10, 5)) for f in (False, True)),
]


def _case(kind: str, stages: int, chunks: int, m: int) -> Case:
    places = stages * chunks
    seconds = {
        "equal": np.full((places, stages), 0.2),  # stages that wake at the same moment are in each other's way
        "unequal": np.broadcast_to(UNEQUAL[:places, None], (places, m)),
        "lengths": np.broadcast_to(LENGTHS[:m], (places, m)),
        "forward_only": np.broadcast_to(LENGTHS[:m], (places, m)),
    }[kind]
    return Case(seconds.tolist(), (1.5 * seconds).tolist(), forward_only=kind == "forward_only")


def _simulate(case: Case, stages: int, chunks: int, communication: Communication) -> Timeline:
    n = case.sequence_chunks
    schedule = Schedule(
        stages, len(case.forward[0]) // n, chunks, case.group_size, case.forward_only, sequence_chunks=n
    )
    return simulate(schedule, case.forward, case.backward, communication)


def _check(case: Case, stages: int, chunks: int, runs: int) -> None:
    """Run until the earliest that each pass began and ended agrees with the simulation, at most three times `runs`.

    What a busy machine adds to a pass or a message can only make other passes later, so the earliest of several runs
    comes nearer to what an idle machine would do, and never lies before it. A message costs what it did in the median.
    """
    timelines: list[Timeline] = []
    while len(timelines) < 3 * runs:
        # gloo makes its connections in the first run
        measured = run_ranks(run_sleeping, stages, [case.shortened()] + [case] * runs, stages, chunks)
        timelines += [timeline for timeline, _ in measured[0][1:]]
        fastest = min(timelines, key=lambda timeline: timeline.step)
        shapes = 0.0 if case.sequence_chunks == 1 else None  # Megatron's communicator sends them
        simulated = _simulate(case, stages, chunks, Communication(_message_seconds(fastest), shapes, "gloo"))
        error = np.abs(np.array(_ends(timelines)).min(axis=0) - _ends([simulated])[0]).max() / simulated.step
        if error <= AGREEMENT:
            break
    message = _message_seconds(fastest)
    print(f"step {fastest.step / simulated.step - 1:+.2%}, worst pass {error:.2%}; {message:.2g} s a message")
    assert error <= AGREEMENT
    assert fastest.step == pytest.approx(simulated.step, rel=AGREEMENT)
    assert fastest.bubble_fraction == pytest.approx(simulated.bubble_fraction, abs=AGREEMENT)


def _message_seconds(timeline: Timeline) -> float:
    moving = [span.transfer for spans in timeline.stages for span in spans if not span.is_pass and span.name != "wait"]
    seconds = float(np.median(moving))
    assert seconds < 0.01, "messages of a few bytes are no part of the comparison"
    return seconds


def _ends(timelines: list[Timeline]) -> list[list[float]]:
    """For each timeline, start and end of every pass of every stage."""
    return [[x for s in range(len(t.stages)) for span in t.passes(s) for x in span[1:3]] for t in timelines]


@pytest.mark.idle
@pytest.mark.parametrize("chunks", [1, 2])
def test_two_stages(chunks: int) -> None:
    """The step, every pass's start and end, and the bubble agree to 3 % of the step on unequal micro-batches."""
    case = _case("lengths", 2, chunks, m=4)
    _check(case, 2, chunks, runs=2)


@pytest.mark.idle
@pytest.mark.parametrize("kind", ["equal", "unequal", "lengths", "forward_only"])
@pytest.mark.parametrize(("stages", "chunks"), MICRO_BATCHES)
def test_timelines(stages: int, chunks: int, kind: str) -> None:
    """The same on all layouts, with equal and unequal stages, and for a forward pass alone."""
    case = _case(kind, stages, chunks, MICRO_BATCHES[stages, chunks])
    _check(case, stages, chunks, runs=3)


@pytest.mark.idle
@pytest.mark.parametrize("kind", ["equal", "lengths", "forward_only"])
@pytest.mark.parametrize("stages", [2, 4])
def test_timelines_of_sequence_chunks(stages: int, kind: str) -> None:
    """The same for three chunks of equal and of RL-like micro-batches, each as long as those are above."""
    whole = _case(kind, stages, 1, m=4)
    forward, backward = (np.repeat(x, 3, axis=1).tolist() for x in (whole.forward, whole.backward))
    _check(replace(whole, forward=forward, backward=backward, sequence_chunks=3), stages, 1, runs=3)


@pytest.mark.parametrize(("stages", "chunks"), [(2, 2), (4, 2)])
def test_blocking_matters(stages: int, chunks: int) -> None:
    """The cases that are measured tell apart messages that block for their shapes from overlapped ones."""
    case = _case("lengths", stages, chunks, MICRO_BATCHES[stages, chunks])
    overlapped = _simulate(case, stages, chunks, Communication())
    blocking = _simulate(case, stages, chunks, Communication(shape_seconds=0.0, backend="gloo"))
    assert overlapped.step < (1 - 2 * AGREEMENT) * blocking.step


@pytest.mark.parametrize("stages", [2, 4])
def test_order(stages: int) -> None:
    """Each stage runs the passes of the schedule, in its order, with and without interleaving."""
    for chunks in (1, 2, 3):
        layouts = [(m, g, f) for p, v, m, g, f in ORDERS if (p, v) == (stages, chunks)]
        nothing = [np.zeros((stages * chunks, m)).tolist() for m, _, _ in layouts]
        cases = [Case(n, n, f, g) for n, (_, g, f) in zip(nothing, layouts, strict=True)]
        results: list[Any] = run_ranks(run_sleeping, stages, cases, stages, chunks) if cases else []
        for stage, result in enumerate(results):
            for (m, g, f), (timeline, order) in zip(layouts, result, strict=True):
                assert order == Schedule(stages, m, chunks, g, f).passes(stage)
                assert order == timeline.order(stage)


@pytest.mark.idle
def test_recorded_trace() -> None:
    """A measured timeline has the sleeping times, adds up, and becomes a Chrome trace as a simulated one does."""
    seconds = [[0.03, 0.05, 0.02], [0.04, 0.02, 0.03]]
    ((timeline, _), *_) = run_ranks(run_sleeping, 2, [Case(seconds, seconds)], 2, 1)[0]
    for stage in range(2):
        for span in timeline.passes(stage):
            assert 0 <= span.seconds - seconds[stage][span.micro_batch] < 0.05
        idle = timeline.step - timeline.busy(stage)
        assert timeline.bubbles()[stage].total == pytest.approx(idle, abs=1e-9)
        assert timeline.stage_bubble_fraction(stage) == pytest.approx(idle / timeline.step)
    events = json.loads(json.dumps(timeline.chrome_trace()))["traceEvents"]
    passes = [e for e in events if e["ph"] == "X" and e["tid"] == 0]
    assert sum(e["dur"] for e in passes) == pytest.approx(1e6 * (timeline.busy(0) + timeline.busy(1)))


@pytest.mark.idle
def test_profile(tmp_path: Path) -> None:
    """A step's metrics are those of its updates, without forward-only runs; every rank writes its stage's trace."""
    seconds = [[0.02, 0.02], [0.05, 0.05]]
    swapped = Case(seconds[::-1], seconds[::-1], forward_only=True)
    cases = [Case(seconds, seconds), *[swapped] * 6, Case(seconds, seconds)]
    metrics = run_ranks(profile_sleeping, 2, cases, 2, tmp_path / "traces")
    assert metrics[0] == metrics[1]
    causes = ("warm_up", "waiting", "drain", "communication")
    assert sum(metrics[0][f"pipeline/bubble_fraction/{c}"] for c in causes) == pytest.approx(
        metrics[0]["pipeline/bubble_fraction"]
    )
    # The second stage computes for 0.2 of 0.24 s, the first for 0.08.
    assert 0.1 < metrics[0]["pipeline/bubble_fraction/stage_1"] < 0.4 < metrics[0]["pipeline/bubble_fraction/stage_0"]
    for rank in range(2):
        events = json.loads((tmp_path / "traces" / f"rank_{rank}.json").read_text())["traceEvents"]
        assert {e["pid"] for e in events} == {rank}
        assert sorted(e["cat"] for e in events if e.get("tid") == 0) == ["backward"] * 2 + ["forward"] * 2
