"""Time of a pipeline: a replay of Megatron's 1F1B schedules, plain or interleaved, with unequal stages.

Models only passes and their dependencies, so that thousands of layouts are compared in seconds. `simulate` also models
messages: rendezvous, blocking calls, shapes sent ahead.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_fipo.shapes.schedule import Schedule


def pipeline_time(
    forward: Sequence[float],
    backward: Sequence[float],
    micro_batches: int | Sequence[float],
    virtual: int = 1,
    p2p: float = 0.0,
    sequence_chunks: int = 1,
) -> float:
    """Return the seconds from the first forward to the last backward pass of all stages.

    Args:
        forward, backward: seconds of one micro-batch on each stage; with several model chunks per stage, on each chunk
            in the order that a micro-batch visits them: chunk c of stage i at c * stages + i.
        micro_batches: number of equal micro-batches, or the time of each in units of `forward` and `backward`.
        virtual: model chunks per stage; with several, micro-batches come in multiples of the stages.
        p2p: seconds per message between stages.
        sequence_chunks: of each micro-batch, of equal time; `p2p` is then of a chunk.
    """
    stages, rest = divmod(len(forward), virtual)
    assert not rest
    assert len(backward) == len(forward)
    if isinstance(micro_batches, Sequence):
        return _replay(forward, backward, list(micro_batches), stages, virtual, p2p, sequence_chunks)
    if stages == 1:
        return micro_batches * (sum(forward) + sum(backward))
    # After two rounds of the pipeline, each further round takes as long as the previous one.
    head = 3 * stages + micro_batches % stages
    if micro_batches <= head:
        return _replay(forward, backward, [1.0] * micro_batches, stages, virtual, p2p, sequence_chunks)
    shorter, longer = (
        _replay(forward, backward, [1.0] * (head - back), stages, virtual, p2p, sequence_chunks) for back in (stages, 0)
    )
    return longer + (longer - shorter) * (micro_batches - head) / stages


def pipeline_estimate(
    forward: Sequence[float],
    backward: Sequence[float],
    micro_batches: int | Sequence[float],
    virtual: int = 1,
    p2p: float = 0.0,
    sequence_chunks: int = 1,
) -> float:
    """Estimate `pipeline_time` without a replay: the busiest stage, and its wait before and after its passes.

    Equal to `pipeline_time` for equal stages and micro-batches without p2p.
    """
    stages = len(forward) // virtual
    count = micro_batches if isinstance(micro_batches, int) else sum(micro_batches)
    passes = [sum(forward[i::stages]) + sum(backward[i::stages]) for i in range(stages)]
    # A micro-batch traverses all other stages once on its way to the busiest one and back.
    busiest = max(range(stages), key=passes.__getitem__)
    others = sum(passes) - passes[busiest]
    return count * passes[busiest] + others / (virtual * sequence_chunks) + 2 * p2p * (stages - 1)


def _replay(
    forward: Sequence[float],
    backward: Sequence[float],
    sizes: Sequence[float],
    stages: int,
    virtual: int,
    p2p: float,
    sequence_chunks: int,
) -> float:
    """Replay the schedule: a pass starts when its stage is free and its input has arrived."""
    count = len(sizes)
    if virtual > 1 and count % stages:  # the schedule needs full rounds
        sizes, count = [*sizes, *[0.0] * (-count % stages)], count + -count % stages
    last = stages * virtual - 1
    schedule = Schedule(stages, count, virtual, sequence_chunks=sequence_chunks)
    sizes = [size / sequence_chunks for size in sizes for _ in range(sequence_chunks)]
    count = schedule.units
    orders = [schedule.passes(i) for i in range(stages)]
    position, free = [0] * stages, [0.0] * stages
    forward_end = [[-1.0] * count for _ in range(last + 1)]
    backward_end = [[-1.0] * count for _ in range(last + 1)]
    ready = list(range(stages))
    while ready:
        i = ready.pop()
        order, at, clock = orders[i], position[i], free[i]
        while at < len(order):
            kind, chunk, m = order[at]
            back = kind == "backward"
            virtual_stage = chunk * stages + i
            if not back:
                arrival = forward_end[virtual_stage - 1][m] if virtual_stage else 0.0
            elif virtual_stage == last:
                arrival = forward_end[virtual_stage][m]
            else:
                arrival = backward_end[virtual_stage + 1][m]
            if arrival < 0:
                break
            neighbour = (virtual_stage != last) if back else virtual_stage > 0
            start = max(clock, arrival + (p2p if neighbour and stages > 1 else 0.0))
            clock = start + sizes[m] * (backward[virtual_stage] if back else forward[virtual_stage])
            (backward_end if back else forward_end)[virtual_stage][m] = clock
            at += 1
        if at > position[i]:
            ready += [j for j in ((i + 1) % stages, (i - 1) % stages) if j not in ready and j != i]
        position[i], free[i] = at, clock
    assert all(at == len(order) for at, order in zip(position, orders, strict=True))
    return max(free)
