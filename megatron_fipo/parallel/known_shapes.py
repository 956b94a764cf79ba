"""Pipeline communication without shape messages, since all stages have the same micro-batch plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.transformer_config import TransformerConfig


class KnownShapes(P2PCommunicator):
    """Megatron's communicator for one run of a schedule, without sending shapes.

    With micro-batches of different lengths, Megatron sends the shape of every tensor first: an additional message that
    blocks even where the tensor's own is overlapped, and two host-device synchronizations. Messages of each direction
    follow the order of a stage's passes, so their shapes are known in advance.
    """

    def __init__(self, group: dist.ProcessGroup, config: TransformerConfig, tokens: Sequence[int], chunks: int) -> None:
        """Compute the shapes of all messages.

        Args:
            group: the pipeline's ranks.
            config: the model's, with `variable_seq_lengths`.
            tokens: of each micro-batch, as sent between stages: a share of a split sequence.
            chunks: model chunks per stage.
        """
        super().__init__(group, config)
        first, last = group.rank() == 0, group.rank() == group.size() - 1
        order = _order(len(tokens), chunks, config)

        def shapes(edge: bool, chunk: int) -> _Shapes:
            """Return the shapes of all passes, at the pipeline's edge without those through this chunk."""
            passes = (micro_batch for micro_batch, position in order if not (edge and position == chunk))
            return _Shapes([[tokens[micro_batch], 1, config.hidden_size] for micro_batch in passes])

        # Forward and backward. A pass visits chunks in the order 0, 1, ..., counted from the end in backward.
        self._received = shapes(first, 0), shapes(last, 0)
        self._sent = shapes(last, chunks - 1), shapes(first, chunks - 1)

    def _communicate_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int], list[int]]:
        """Return the shapes to receive from the previous and the next stage; zeros where nothing is received.

        Raises:
            RuntimeError: a tensor to send does not have the shape that the receiver expects.
        """
        for shapes, tensor in zip(self._sent, (tensor_send_next, tensor_send_prev), strict=True):
            if tensor is not None:
                shapes.check(tensor)
        forward, backward = (
            shapes.take() if receives else [0, 0, 0]
            for shapes, receives in zip(self._received, (recv_prev, recv_next), strict=True)
        )
        return forward, backward


class _Shapes:
    """Shapes of one direction's messages, in order."""

    def __init__(self, shapes: list[list[int]]) -> None:
        self._shapes, self._taken = shapes, 0

    def take(self) -> list[int]:
        if self._taken == len(self._shapes):
            raise RuntimeError(f"a pipeline stage has more messages than the {self._taken} of its micro-batches")
        self._taken += 1
        return self._shapes[self._taken - 1]

    def check(self, tensor: torch.Tensor) -> None:
        expected = self.take()
        if list(tensor.shape) != expected:
            raise RuntimeError(f"a pipeline stage sends {list(tensor.shape)}, but its receiver expects {expected}")


def _order(micro_batches: int, chunks: int, config: TransformerConfig) -> list[tuple[int, int]]:
    """Return (micro-batch, chunk position) of each pass of a stage; equal forward and backward."""
    if chunks == 1:
        return [(micro_batch, 0) for micro_batch in range(micro_batches)]
    table: Any = get_schedule_table(micro_batches, chunks, config.microbatch_group_size_per_vp_stage)
    return list(table)
