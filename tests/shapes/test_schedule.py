"""The order of passes against Megatron's own tables, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import megatron_fipo.parallel  # noqa: F401  sets up the CPU backend before Megatron is imported
from megatron_fipo.shapes.schedule import Exchange, Pass, Schedule, Wait

# stages, micro-batches, chunks, group size
INTERLEAVED = [(2, 2, 2, 2), (2, 8, 3, 2), (2, 5, 2, 3), (4, 4, 2, 4), (4, 12, 2, 4), (4, 10, 3, 5), (8, 16, 4, 8)]
SCHEDULES = [
    *(Schedule(p, m, forward_only=f) for p in (1, 2, 4, 8) for m in (1, 3, 8) for f in (False, True)),
    *(
        Schedule(p, m, v, g, overlap=overlap, forward_only=f)
        for p, m, v, g in INTERLEAVED
        for overlap in (True, False)
        for f in (True, False)
        if overlap or p > 2
    ),
]


# stages, micro-batches, sequence chunks
CHUNKED = [
    Schedule(p, m, forward_only=f, sequence_chunks=n)
    for p, m, n in [(1, 3, 4), (2, 1, 2), (2, 3, 3), (3, 2, 1), (4, 1, 2), (4, 1, 8), (4, 5, 3), (8, 3, 2)]
    for f in (False, True)
]


def _communicator(p: int, stage: int, v: int) -> Any:
    group = SimpleNamespace(size=lambda: p, rank=lambda: stage)
    return SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=v if v > 1 else None)


@pytest.mark.parametrize(("p", "m", "v", "group"), INTERLEAVED)
def test_interleaved_order_is_megatrons(p: int, m: int, v: int, group: int) -> None:
    """Forwards follow Megatron's schedule table, backwards the table with chunks mirrored."""
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    table = get_schedule_table(m, v, group)
    for stage in range(p):
        passes = Schedule(p, m, v, group).passes(stage)
        assert [(x.micro_batch, x.chunk) for x in passes if x.kind == "forward"] == table
        assert [(x.micro_batch, v - 1 - x.chunk) for x in passes if x.kind == "backward"] == table


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_warm_up_is_megatrons(schedule: Schedule) -> None:
    """Warm-up has the number of forwards that Megatron counts, plus the first one of the 1F1B phase."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    p, m, v = schedule.stages, schedule.micro_batches, schedule.chunks
    for stage in range(p):
        _, everything, warm_up, _ = get_pp_rank_microbatches(
            m, v, schedule.group, schedule.forward_only, p2p_communicator=_communicator(p, stage, v)
        )
        kinds = [x.kind for x in schedule.passes(stage)]
        before = kinds.index("backward") if "backward" in kinds else len(kinds)
        assert before == warm_up + (not everything)


def test_one_forward_one_backward() -> None:
    """The second of three stages with four micro-batches: one forward to warm up, then in turn, one backward left."""
    order = ["F0", "F1", "B0", "F2", "B1", "F3", "B2", "B3"]
    expected = [Pass("forward" if x[0] == "F" else "backward", 0, int(x[1])) for x in order]
    assert Schedule(3, 4).passes(1) == expected


@pytest.mark.parametrize("schedule", CHUNKED, ids=str)
def test_chunks_go_backward_in_reverse(schedule: Schedule) -> None:
    """Every unit once each way, forward in order; a micro-batch goes backward from its last chunk to its first, all of
    it after its whole forward; and no stage holds more units than the pipeline is long, beside the other chunks of a
    micro-batch."""
    p, m, n = schedule.stages, schedule.micro_batches, schedule.sequence_chunks
    for stage in range(p):
        passes = schedule.passes(stage)
        forward = [x.micro_batch for x in passes if x.kind == "forward"]
        assert forward == list(range(m * n)) == list(range(schedule.units))
        if schedule.forward_only:
            continue
        backward = [x.micro_batch for x in passes if x.kind == "backward"]
        assert backward == [i * n + j for i in range(m) for j in reversed(range(n))]
        for i in range(m):
            last, first = (
                passes.index(Pass("forward", 0, i * n + n - 1)),
                passes.index(Pass("backward", 0, i * n + n - 1)),
            )
            assert last < first
        held = [1 if x.kind == "forward" else -1 for x in passes]
        assert max(sum(held[: i + 1]) for i in range(len(held))) <= p - stage + n - 1


@pytest.mark.parametrize("schedule", SCHEDULES + CHUNKED, ids=str)
def test_every_message_has_a_sender_and_a_receiver(schedule: Schedule) -> None:
    """Each message of a stage is received once by its neighbour, in the same order on each connection."""
    sent: dict[tuple[int, int], list[Any]] = {}
    received: dict[tuple[int, int], list[Any]] = {}
    p = schedule.stages
    for stage in range(p):
        for step in schedule.program(stage):
            if isinstance(step, Exchange):
                for message in step.sends:
                    assert message.source % p == stage
                    sent.setdefault((stage, message.target % p), []).append(message)
                for message in step.receives:
                    assert message.target % p == stage
                    received.setdefault((message.source % p, stage), []).append(message)
    assert sent == received
    boundaries = schedule.virtual_stages - 1
    directions = 1 if schedule.forward_only else 2
    assert sum(map(len, sent.values())) == boundaries * directions * schedule.units


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s.chunks > 1], ids=str)
def test_waits_follow_their_exchange(schedule: Schedule) -> None:
    """Only messages of exchanges that did not block are waited for; receives before the pass that takes them."""
    for stage in range(schedule.stages):
        under_way: set[Any] = set()
        for step in schedule.program(stage):
            if isinstance(step, Exchange) and not step.blocking:
                under_way |= {(m, True) for m in step.sends} | {(m, False) for m in step.receives}
            elif isinstance(step, Wait):
                under_way.remove((step.message, step.sent))
            elif isinstance(step, Pass):
                place = step.chunk * schedule.stages + stage
                assert not [
                    m for m, out in under_way if not out and (m.kind, m.target, m.micro_batch) == _input(step, place)
                ]
        assert not [m for m, out in under_way if not out]


def _input(step: Pass, place: int) -> tuple[str, int, int]:
    return step.kind, place, step.micro_batch


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "each must be at least 1"),
        ((1, 4, 2), "at least 2 stages"),
        ((4, 2, 2), "must be between the 4 stages and the 2 micro-batches"),
        ((4, 6, 2), "the last group has 6 % 4 = 2 micro-batches, fewer than the 4 stages"),
        ((4, 8, 2, 3), "the group size 3 of"),
        ((4, 8, 2, 4, False, True, 2), "cannot be combined with sequence chunks"),
        ((4, 8, 1, None, False, True, 0), "each must be at least 1"),
    ],
)
def test_refused(arguments: tuple[int, ...], message: str) -> None:
    """Layouts that Megatron refuses."""
    with pytest.raises(ValueError, match=message):
        Schedule(*arguments)


def test_two_stages_need_overlap_to_interleave() -> None:
    """Megatron's batched messages in both directions between the same two ranks would pair up wrongly."""
    with pytest.raises(ValueError, match="overlapped communication"):
        Schedule(2, 4, 2, overlap=False)


@pytest.mark.parametrize("schedule", SCHEDULES + CHUNKED, ids=str)
def test_passes_are_those_of_the_program(schedule: Schedule) -> None:
    """In the same order, with and without the communication between them."""
    for stage in range(schedule.stages):
        assert schedule.passes(stage) == [step for step in schedule.program(stage) if isinstance(step, Pass)]
