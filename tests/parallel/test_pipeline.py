"""The executor of schedules: every stage gets what its neighbours sent, in the schedule's order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import megatron_fipo.parallel  # noqa: F401  sets up the CPU backend
from megatron_fipo.parallel.pipeline import execute
from megatron_fipo.shapes.schedule import Pass, Schedule
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

SCHEDULES = [
    Schedule(p, m, forward_only=f, sequence_chunks=n)
    for p, m, n in [(1, 2, 3), (2, 3, 1), (2, 3, 4), (4, 1, 2), (4, 3, 3)]
    for f in (False, True)
]


class _Counting:
    """A stage that adds 1 to what it gets, forward and backward; every fifth unit has no tokens."""

    def __init__(self, stages: int, wrong: int | None = None) -> None:
        self.stages, self.wrong = stages, wrong
        self.passes: list[Pass] = []
        self.results: list[tuple[str, int, float]] = []  # of the pipeline's ends

    def shape(self, unit: int) -> tuple[int, ...]:
        return unit % 5, 1, 2

    def forward(self, unit: int, received: torch.Tensor | None) -> torch.Tensor | None:
        return self._add("forward", unit, received, end=self.stages - 1)

    def backward(self, unit: int, received: torch.Tensor | None) -> torch.Tensor | None:
        return self._add("backward", unit, received, end=0)

    def _add(self, kind: Any, unit: int, received: torch.Tensor | None, end: int) -> torch.Tensor | None:
        self.passes.append(Pass(kind, 0, unit))
        begins = dist.get_rank() == self.stages - 1 - end
        if 0 in self.shape(unit):
            assert received is None
            return None
        assert (received is None) == begins
        value = torch.full(self.shape(unit), float(unit)) if received is None else received + 1
        if dist.get_rank() == end:
            self.results.append((kind, unit, float(value.sum()) / value.numel()))
            return None
        return value[:-1] if unit == self.wrong else value


def _run(schedules: list[Schedule]) -> list[Any]:
    found = []
    for schedule in schedules:
        stage = _Counting(schedule.stages)
        execute(schedule, stage, dist.group.WORLD, torch.float32)
        found.append((stage.passes, stage.results))
    return found


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_messages_arrive(stages: int) -> None:
    """Passes are the schedule's, and each unit reaches the other end, with one addition for each boundary."""
    schedules = [s for s in SCHEDULES if s.stages == stages]
    results = run_ranks(_run, stages, schedules)
    for i, schedule in enumerate(schedules):
        units = [unit for unit in range(schedule.units) if unit % 5]
        for stage, result in enumerate(results):
            passes, ends = result[i]
            assert passes == schedule.passes(stage)
            kinds = ["forward"] * (stage == stages - 1)
            kinds += ["backward"] * (stage == 0 and not schedule.forward_only)
            expected = [(kind, unit, unit + stages - 1.0) for kind in kinds for unit in units]
            assert sorted(ends) == sorted(expected)


def _send_the_wrong_shape() -> None:
    if dist.get_rank() == 0:
        # unit 0 has no tokens, so the error comes before any message
        execute(Schedule(2, 3), _Counting(2, wrong=1), dist.group.WORLD, torch.float32)


def test_another_shape_is_an_error() -> None:
    """The sender fails, and says what the receiver expects."""
    with pytest.raises(RuntimeError, match=r"a pipeline stage sends \[0, 1, 2\] as .* expects \[1, 1, 2\]"):
        run_ranks(_send_the_wrong_shape, 2)


def test_interleaved_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="executed by Megatron-Core"):
        execute(Schedule(2, 2, 2), _Counting(2), None, torch.float32)  # type: ignore[arg-type]
