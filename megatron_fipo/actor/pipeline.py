"""Runs of the policy's pipeline over micro-batches: Megatron-Core's schedules, and that of sequence chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_fipo.actor.chunked_stage import ChunkedStage, Report
from megatron_fipo.actor.gradients import finalize_gradients
from megatron_fipo.batch import MicroBatch
from megatron_fipo.config import ParallelConfig
from megatron_fipo.parallel.known_shapes import KnownShapes
from megatron_fipo.parallel.pipeline import execute
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.shapes.architecture import Architecture
from megatron_fipo.shapes.schedule import Schedule


class Pipeline:
    """This rank's model chunks in the pipeline of its replica."""

    def __init__(
        self,
        wrapped: Sequence[DistributedDataParallel],
        arch: Architecture,
        config: ParallelConfig,
        topology: Topology,
    ) -> None:
        self._wrapped, self._arch, self._topology = list(wrapped), arch, topology
        self._sequence_chunks = config.sequence_chunks
        self._config: Any = wrapped[0].config

    def run(self, micro_batches: Sequence[MicroBatch], report: Report, is_loss: bool, forward_only: bool) -> list[Any]:
        """Run forward and, unless `forward_only`, backward passes, and reduce the gradients. Collective.

        Args:
            report: of the last stage's output for a micro-batch, `[2, R_local]`, and the micro-batch on the device.
            is_loss: the report is (loss sum, denominator, metrics), of which the metrics are returned.

        Returns:
            On the last stage, what was reported of each micro-batch.
        """
        if self._sequence_chunks > 1:
            return self._run_chunks(micro_batches, report, is_loss, forward_only)

        def step(iterator: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            micro_batch = next(iterator).to(self._topology.device)
            return model(micro_batch), lambda output, non_loss_data=True: report(output, micro_batch)

        iterators = [iter(micro_batches) for _ in self._wrapped]
        interleaved = len(self._wrapped) > 1
        reports: list[Any] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if interleaved else iterators[0],
            model=self._wrapped if interleaved else self._wrapped[0],
            num_microbatches=len(micro_batches),
            seq_length=1,  # each micro-batch has another
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=not is_loss,
            **self._messages(micro_batches),
        )
        return reports

    def _messages(self, micro_batches: Sequence[MicroBatch]) -> dict[str, Any]:
        """Return what gives Megatron's schedule the shapes of the pipeline's messages."""
        topology = self._topology
        if topology.pp.size() == 1:
            return {}
        share = topology.tp.size() if self._config.sequence_parallel else 1
        tokens = [micro_batch.input_ids.numel() // share for micro_batch in micro_batches]
        communicator = KnownShapes(topology.pp, self._config, tokens, len(self._wrapped))
        return {"p2p_communicator": communicator, "pg_collection": topology.groups}

    def _run_chunks(
        self, micro_batches: Sequence[MicroBatch], report: Report, is_loss: bool, forward_only: bool
    ) -> list[Any]:
        topology, (model,), chunks = self._topology, self._wrapped, self._sequence_chunks
        stage = ChunkedStage(model, micro_batches, chunks, self._arch, topology, report, is_loss, forward_only)
        schedule = Schedule(topology.pp.size(), len(micro_batches), forward_only=forward_only, sequence_chunks=chunks)
        execute(schedule, stage, topology.pp, self._config.pipeline_dtype, self._config.timers)
        if not forward_only:
            finalize_gradients([model], stage.num_tokens, topology.groups)
        return stage.reports
