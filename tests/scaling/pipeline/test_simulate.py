"""The simulator where the answer is known in closed form, and what holds for every timeline."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.scaling.pipeline.simulate import Communication, simulate
from megatron_fipo.scaling.pipeline.timeline import Timeline, write_trace
from megatron_fipo.shapes.schedule import Schedule

EXACT = 1e-12
COMMUNICATION = {
    "shapes_over_nccl": Communication(shape_seconds=0.0),
    "shapes_over_gloo": Communication(shape_seconds=0.0, backend="gloo"),
    "known_shapes": Communication(),
}
EQUAL = [(p, m, 1) for p in (1, 2, 3, 4, 8, 16) for m in (1, 2, 5, 16, 64)]
EQUAL += [(p, p * k, v) for p in (2, 3, 4, 8, 16) for k in (1, 2, 4) for v in (2, 3, 4)]


@pytest.mark.parametrize("communication", COMMUNICATION.values(), ids=COMMUNICATION)
@pytest.mark.parametrize(("p", "m", "v"), EQUAL)
def test_equal_stages(p: int, m: int, v: int, communication: Communication) -> None:
    """Idle over ideal time is (p - 1) / (m v), and the bubble's fraction of the step (p - 1) / (m v + p - 1)."""
    timeline = simulate(Schedule(p, m, v), 1.0 / v, 2.0 / v, communication)
    assert timeline.idle_over_ideal == pytest.approx((p - 1) / (m * v), rel=EXACT, abs=EXACT)
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (m * v + p - 1), rel=EXACT, abs=EXACT)
    assert timeline.step == pytest.approx(3 * (m + (p - 1) / v), rel=EXACT)


@pytest.mark.parametrize(("p", "m"), [(p, m) for p, m, v in EQUAL if v == 1 and m >= p > 1])
def test_equal_stages_idle_only_at_the_ends(p: int, m: int) -> None:
    """Stage s idles s F + (p - 1 - s) B while the pipeline fills, s B + (p - 1 - s) F while it drains, else never."""
    forward, backward = 1.0, 2.0
    for stage, bubble in enumerate(simulate(Schedule(p, m), forward, backward).bubbles()):
        late = p - 1 - stage
        assert bubble.warm_up == pytest.approx(stage * forward + late * backward, rel=EXACT)
        assert bubble.drain == pytest.approx(stage * backward + late * forward, rel=EXACT)
        assert (bubble.waiting, bubble.communication) == (0, 0)


@pytest.mark.parametrize("p", [3, 4, 8])
def test_transfers_of_a_forward_pass(p: int) -> None:
    """Inner stages receive, compute and send in turn: F + 2c a micro-batch, after the first's p F + (p - 1) c."""
    m, forward, transfer = 6, 1.0, 0.25
    timeline = simulate(Schedule(p, m, forward_only=True), forward, 0.0, Communication(transfer))
    expected = p * forward + (p - 1) * transfer + (m - 1) * (forward + 2 * transfer)
    assert timeline.step == pytest.approx(expected, rel=EXACT)


def test_slowest_stage_sets_the_pace() -> None:
    """With one slow last stage: its own passes, the first forward to it and the last backward from it."""
    p, m = 4, 20
    forward = np.array([[1.0], [1.0], [1.0], [5.0]])
    timeline = simulate(Schedule(p, m), forward, 2 * forward)
    assert timeline.step == pytest.approx(m * 15.0 + (p - 1) * 3.0, rel=EXACT)
    assert timeline.bubbles()[0].waiting > timeline.bubbles()[0].warm_up


def test_a_boundary_and_a_micro_batch_have_their_own_transfer() -> None:
    """Seconds over [V - 1, m]: two stages, forward only, pass each other the sum of them."""
    seconds = np.array([[0.5, 0.25, 0.125]])
    timeline = simulate(Schedule(2, 3, forward_only=True), 1.0, 0.0, Communication(seconds))
    assert timeline.step == pytest.approx(4 * 1.0 + seconds.sum(), rel=EXACT)
    assert timeline.bubbles()[0].communication == pytest.approx(seconds.sum(), rel=EXACT)


def test_a_stage_that_sends_and_receives_waits_for_both() -> None:
    """The first stage's second forward ends at 2; its message is taken when the last stage has done its backward at 12,
    and only then does its own backward begin."""
    timeline = simulate(Schedule(2, 2), np.array([[1.0], [1.0]]), np.array([[2.0], [10.0]]))
    first_backward = timeline.passes(0)[2]
    assert (first_backward.name, first_backward.start) == ("backward", 12.0)


def test_shapes_block_overlapped_messages() -> None:
    """Known shapes, the default, let an input arrive during the pass before; an input whose shape is sent first is
    waited for when it is requested."""
    rng = np.random.default_rng(0)
    forward = np.repeat(rng.uniform(0.2, 2, (1, 16)), 8, axis=0)
    known, sent = (
        simulate(Schedule(4, 16, 2), forward, 2 * forward, c).step for c in (None, Communication(shape_seconds=0.0))
    )
    assert known < sent
    assert simulate(Schedule(4, 16, 2), forward, 2 * forward, Communication(shape_seconds=None)).step == known


def test_stages_that_wait_for_each_other() -> None:
    """Without overlap, shape messages whose sends wait for their receiver stop this pipeline for ever."""
    with pytest.raises(ValueError, match="are deadlocked: stage"):
        simulate(Schedule(4, 4, 2, overlap=False), 1.0, 2.0, Communication(shape_seconds=0.0, backend="gloo"))


@pytest.mark.parametrize(
    ("forward", "message"),
    [(np.ones((3, 4)), "shape \\[3, 4\\], must be \\[2, 4\\]"), (-1.0, "non-negative"), (np.nan, "finite")],
)
def test_refused_times(forward: Any, message: str) -> None:
    """Times that fit no schedule."""
    with pytest.raises(ValueError, match=message):
        simulate(Schedule(2, 4), forward, 1.0)


@st.composite
def _cases(draw: st.DrawFn) -> tuple[Schedule, Timeline, np.ndarray, np.ndarray, np.ndarray]:
    p, v = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    v = v if p > 1 else 1
    overlap = draw(st.booleans()) or p == 2
    m = draw(st.integers(1, 9)) if v == 1 else p * draw(st.integers(1, 3))
    if v > 1 and not overlap and m == p:
        m *= 2
    forward_only = draw(st.booleans())
    schedule = Schedule(p, m, v, overlap=overlap, forward_only=forward_only)
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    forward, backward = rng.uniform(0, 2, (2, p * v, m))
    seconds = rng.uniform(0, draw(st.sampled_from([0.0, 0.5])), (p * v - 1, m))
    backend, shapes = draw(st.sampled_from(["nccl", "gloo"])), draw(st.sampled_from([None, 0.0, 0.01]))
    if not overlap:
        backend = "nccl"
    communication = Communication(seconds, shapes, backend)
    return schedule, simulate(schedule, forward, backward, communication), forward, backward, seconds


@settings(max_examples=150)
@given(_cases())
def test_what_holds_for_every_timeline(case: Any) -> None:
    """Every pass runs once, in the schedule's order, one at a time on a stage, after its input has been computed and
    sent; and each stage's bubbles add up to its idle time."""
    schedule, timeline, forward, backward, seconds = case
    p = schedule.stages
    places = {}
    for stage in range(p):
        passes = timeline.passes(stage)
        assert timeline.order(stage) == schedule.passes(stage)
        assert (
            len(set(timeline.order(stage)))
            == len(passes)
            == schedule.micro_batches * schedule.chunks * (1 if schedule.forward_only else 2)
        )
        spans = timeline.stages[stage]
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(spans))
        for x in passes:
            place = x.chunk * p + stage
            places[x.name, place, x.micro_batch] = x
            expected = (forward if x.name == "forward" else backward)[place, x.micro_batch]
            assert x.seconds == pytest.approx(expected, abs=1e-9)
        bubble = timeline.bubbles()[stage]
        assert bubble.total == pytest.approx(timeline.step - timeline.busy(stage), abs=1e-9)
        assert min(bubble.warm_up, bubble.waiting, bubble.drain, bubble.communication) >= -1e-9
    for (name, place, micro_batch), x in places.items():
        source = place - 1 if name == "forward" else place + 1
        if (name, source, micro_batch) in places:
            arrives = places[name, source, micro_batch].end + seconds[min(place, source), micro_batch]
            assert x.start >= arrives - 1e-9
        if name == "backward":
            assert x.start >= places["forward", place, micro_batch].end - 1e-9


def test_chrome_trace(tmp_path: Path) -> None:
    """The file loads, and its microseconds are the timeline's seconds."""
    timeline = simulate(Schedule(3, 4), 0.5, 1.0, Communication(0.125))
    write_trace(tmp_path / "trace.json", timeline.chrome_trace())
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]
    for stage in range(3):
        mine = [e for e in events if e["pid"] == stage and e["ph"] == "X"]
        assert [(e["ts"], e["dur"]) for e in mine] == [(s.start * 1e6, s.seconds * 1e6) for s in timeline.stages[stage]]
        computing = [e["args"]["micro_batch"] for e in mine if e["tid"] == 0]
        assert computing == [s.micro_batch for s in timeline.passes(stage)]
