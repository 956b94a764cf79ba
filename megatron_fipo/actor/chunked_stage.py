"""A pipeline stage that computes micro-batches in sequence chunks, for `parallel.pipeline.execute`.

The last stage has the log-probabilities of a whole micro-batch before the backward pass of its last chunk begins, so
that the loss, its metrics, the veto and the Future-KL scan are those of whole sequences, as without chunks. Each chunk
then goes backward with its part of the loss's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from megatron.core.utils import get_attr_wrapped_model
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megatron_fipo.batch import MicroBatch
from megatron_fipo.model.sequence_chunks import SequenceChunk, cut
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.shapes.architecture import Architecture
from megatron_fipo.shapes.sequence_chunks import chunk_bounds, cost_of_key

Report = Callable[[torch.Tensor, MicroBatch], Any]


@dataclass
class _Unit:
    """A chunk under way: what its backward pass needs."""

    received: torch.Tensor | None
    output: GradientEdge


class ChunkedStage:
    """This rank's stage in one run of a schedule.

    Attributes:
        reports: last stage: what `report` returned of each micro-batch; of a loss, its metrics.
        num_tokens: 0-dim integer, the loss's denominators; 0 on the other stages.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        micro_batches: Sequence[MicroBatch],
        chunks: int,
        arch: Architecture,
        topology: Topology,
        report: Report,
        is_loss: bool,
        forward_only: bool,
    ) -> None:
        """Cut the micro-batches.

        Args:
            model: the stage's, wrapped for training.
            report: of the last stage's output of a whole micro-batch, `[2, R]`.
            is_loss: the report is (loss sum, denominator, metrics).
        """
        self._model, self._topology = model, topology
        self._micro_batches, self._chunks = micro_batches, chunks
        self._report, self._is_loss, self._forward_only = report, is_loss, forward_only
        self._config: Any = model.config
        heads = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        of_key = cost_of_key(arch.hidden_size, arch.ffn_hidden_size, *heads)
        alignment = topology.sequence_alignment
        self._bounds = [chunk_bounds(m.padded_lengths, chunks, alignment, of_key) for m in micro_batches]
        self._cut: dict[int, list[tuple[SequenceChunk, MicroBatch]]] = {}  # of the micro-batches under way
        self._tokens = [end - start for bounds in self._bounds for start, end in pairwise(bounds)]  # of each unit
        self._outputs: list[torch.Tensor] = []  # of the micro-batch that goes forward
        self._under_way: dict[int, _Unit] = {}
        self._gradients: dict[int, tuple[torch.Tensor, ...]] = {}  # last stage: of each chunk's output
        self.reports: list[Any] = []
        self.num_tokens = torch.zeros((), dtype=torch.int, device=topology.device)

    def shape(self, unit: int) -> tuple[int, ...]:
        share = self._topology.tp.size() if self._config.sequence_parallel else 1
        return self._tokens[unit] // share, 1, self._config.hidden_size

    def forward(self, unit: int, received: torch.Tensor | None) -> torch.Tensor | None:
        number, chunk = divmod(unit, self._chunks)
        if chunk == 0:
            self._cut[number] = cut(self._micro_batches[number], self._bounds[number])
        output = self._compute(unit, received) if self._tokens[unit] else None
        if self._topology.is_last_stage:
            if output is not None:
                self._outputs.append(output.detach())
            if chunk == self._chunks - 1:
                self._finish(number)
        if chunk == self._chunks - 1 and self._forward_only:
            self._cut.pop(number)
        return None if self._topology.is_last_stage or output is None else output.detach()

    def _compute(self, unit: int, received: torch.Tensor | None) -> torch.Tensor:
        number, position = divmod(unit, self._chunks)
        chunk, part = self._cut[number][position]
        if received is not None:
            received.requires_grad_(not self._forward_only)
        get_attr_wrapped_model(self._model, "set_input_tensor")([received])
        output: torch.Tensor = self._model(part.to(self._topology.device), chunk)
        if not self._forward_only:
            self._under_way[unit] = _Unit(received, get_gradient_edge(output))
        return output

    def _finish(self, number: int) -> None:
        """Report on a micro-batch whose outputs are complete, and compute the loss's gradient in each chunk's."""
        sizes = [output.shape[1] for output in self._outputs]
        whole = torch.cat(self._outputs, dim=1).requires_grad_(not self._forward_only)
        self._outputs.clear()
        reported = self._report(whole, self._micro_batches[number].to(self._topology.device))
        if self._is_loss:
            total, num_tokens, reported = reported
            self.num_tokens += num_tokens
        if not self._forward_only:
            (gradient,) = torch.autograd.grad(total, whole)
            self._gradients[number] = gradient.split(sizes, dim=1)
        self.reports.append(reported)

    def backward(self, unit: int, received: torch.Tensor | None) -> torch.Tensor | None:
        number, chunk = divmod(unit, self._chunks)
        gradient = None
        if self._tokens[unit]:
            at = self._under_way.pop(unit)
            of_output = self._gradients[number][chunk] if self._topology.is_last_stage else received
            torch.autograd.backward(at.output, of_output)
            gradient = None if at.received is None else at.received.grad
        if chunk == 0:
            self._cut.pop(number)
            self._gradients.pop(number, None)
        return gradient
