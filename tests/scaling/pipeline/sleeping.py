"""Stages that sleep for given times, under Megatron's schedules and that of sequence chunks; all of it in a rank."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config

from megatron_fipo.model.architecture import architecture
from megatron_fipo.model.build import transformer_config
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.parallel.pipeline import execute
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.profiling.pipeline_recorder import PipelineProfile, PipelineRecorder
from megatron_fipo.scaling.pipeline.timeline import Timeline
from megatron_fipo.shapes.schedule import Kind, Pass, Schedule
from tests.support.policies import make_config


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stage: SleepingStage, micro_batch: int) -> torch.Tensor:
        ctx.stage, ctx.micro_batch = stage, micro_batch
        stage.sleep("forward", micro_batch)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        assert gradient.shape[0] == _tokens(ctx.micro_batch)
        ctx.stage.sleep("backward", ctx.micro_batch)
        return gradient, None, None


def _tokens(micro_batch: int) -> int:
    return 3 + micro_batch


class SleepingStage(torch.nn.Module):
    """A virtual stage. A micro-batch's hidden states are `[tokens, 1, h]`, with another number of tokens each."""

    def __init__(self, config: Any, chunk: int, seconds: dict[Kind, Sequence[float]], order: list[Pass]) -> None:
        from megatron.core.enums import ModelType

        super().__init__()
        self.config, self.chunk, self.model_type = config, chunk, ModelType.encoder_or_decoder
        self.seconds, self.order = seconds, order
        self.weight = torch.nn.Parameter(torch.ones(config.hidden_size))
        self.input: torch.Tensor | None = None

    def set_input_tensor(self, tensors: list[torch.Tensor | None]) -> None:
        (self.input,) = tensors

    def forward(self, micro_batch: int) -> torch.Tensor:
        x = self.input if self.input is not None else torch.ones(_tokens(micro_batch), 1, self.config.hidden_size)
        assert x.shape[0] == _tokens(micro_batch)
        return _Sleep.apply(x * self.weight, self, micro_batch)

    def sleep(self, kind: Kind, micro_batch: int) -> None:
        self.order.append(Pass(kind, self.chunk, micro_batch))
        time.sleep(self.seconds[kind][micro_batch])


def _step(micro_batches: Iterator[int], model: torch.nn.Module) -> Any:
    micro_batch = next(micro_batches)

    def loss(output: torch.Tensor, non_loss_data: bool = False) -> Any:
        return output.sum(), torch.tensor(output.shape[0]), micro_batch

    return model(micro_batch), loss


@dataclass(frozen=True)
class Case:
    """Seconds of each pass, `[virtual stages, micro-batches]`, or with sequence chunks of each unit."""

    forward: Sequence[Sequence[float]]
    backward: Sequence[Sequence[float]]
    forward_only: bool = False
    group_size: int | None = None
    sequence_chunks: int = 1

    def shortened(self) -> Case:
        """The same, a hundred times faster."""
        forward, backward = ([[x / 100 for x in row] for row in rows] for rows in (self.forward, self.backward))
        return replace(self, forward=forward, backward=backward)


@contextmanager
def _pipeline(stages: int, chunks: int) -> Iterator[tuple[Any, Topology]]:
    """The actor's own Megatron config, and this rank's place."""
    model = Qwen2Config(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=stages * chunks)
    parallel = {"pipeline": stages, "virtual_pipeline": chunks, "world_size": stages}
    config = make_config(Path("unused"), parallel=parallel)
    topology = topologies.initialize(config.parallel, seed=1)
    try:
        yield transformer_config(architecture(model), config), topology
    finally:
        topologies.destroy()


def run_sleeping(cases: Sequence[Case], stages: int, chunks: int) -> list[tuple[Timeline, list[Pass]]]:
    """For each case, all of as many sequence chunks, the measured timeline and this rank's passes in their order."""
    with _pipeline(stages, chunks) as (config, topology):
        (sequence_chunks,) = {case.sequence_chunks for case in cases}
        recorder = PipelineRecorder(config, topology.pp, sequence_chunks == 1, sequence_chunks)
        orders = [_run(case, config, topology, recorder) for case in cases]
        return list(zip(recorder.timelines(), orders, strict=True))


def profile_sleeping(cases: Sequence[Case], stages: int, directory: Path) -> dict[str, float]:
    """The metrics of a step with these runs of the schedule."""
    with _pipeline(stages, chunks=1) as (config, topology):
        profile = PipelineProfile(config, topology.pp, directory)
        for case in cases:
            _run(case, config, topology, profile.recorder)
        return profile.finish_step()


def _run(case: Case, config: Any, topology: Topology, recorder: PipelineRecorder) -> list[Pass]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    if case.sequence_chunks > 1:
        return _run_chunks(case, config, topology, recorder)
    order: list[Pass] = []
    chunks = []
    for chunk in range(topology.virtual_pipeline):
        place = chunk * topology.pp.size() + topology.pp.rank()
        seconds = {"forward": case.forward[place], "backward": case.backward[place]}
        chunks.append(SleepingStage(config, chunk, seconds, order))
    micro_batches = len(case.forward[0])
    iterators = [iter(range(micro_batches)) for _ in chunks]
    config.microbatch_group_size_per_vp_stage = case.group_size or topology.pp.size()
    with recorder(micro_batches, case.forward_only), torch.set_grad_enabled(not case.forward_only):
        get_forward_backward_func()(
            forward_step_func=_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=micro_batches,
            seq_length=1,
            micro_batch_size=1,
            forward_only=case.forward_only,
        )
    assert config.timers is None
    return order


class _SleepingUnits:
    """A stage of an `execute`d schedule."""

    def __init__(self, case: Case, config: Any, stage: int) -> None:
        self.seconds: dict[Kind, Sequence[float]] = {"forward": case.forward[stage], "backward": case.backward[stage]}
        self.width, self.order = config.hidden_size, list[Pass]()

    def shape(self, unit: int) -> tuple[int, ...]:
        return _tokens(unit), 1, self.width

    def forward(self, unit: int, received: torch.Tensor | None) -> torch.Tensor:
        return self._sleep("forward", unit)

    def backward(self, unit: int, received: torch.Tensor | None) -> torch.Tensor:
        return self._sleep("backward", unit)

    def _sleep(self, kind: Kind, unit: int) -> torch.Tensor:
        self.order.append(Pass(kind, 0, unit))
        time.sleep(self.seconds[kind][unit])
        return torch.zeros(self.shape(unit))


def _run_chunks(case: Case, config: Any, topology: Topology, recorder: PipelineRecorder) -> list[Pass]:
    n, group = case.sequence_chunks, topology.pp
    micro_batches = len(case.forward[0]) // n
    stage = _SleepingUnits(case, config, group.rank())
    with recorder(micro_batches, case.forward_only):
        schedule = Schedule(group.size(), micro_batches, forward_only=case.forward_only, sequence_chunks=n)
        execute(schedule, stage, group, torch.float32, config.timers)
    return stage.order
