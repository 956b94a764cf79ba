"""Messages of a pipeline whose shapes all stages know, since all have the same plan of micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.transformer_config import TransformerConfig


class KnownShapes(P2PCommunicator):
    """Megatron's communicator for one run of a schedule, which sends no shapes ahead of its messages.

    Where micro-batches differ in length, Megatron sends the shape of every tensor first: one more message, which blocks
    even where the tensor's own is overlapped, and two waits of the host for the device. Each stage's messages of a
    direction have the order of its passes, so their shapes are known beforehand.
    """

    def __init__(self, group: dist.ProcessGroup, config: TransformerConfig, tokens: Sequence[int], chunks: int) -> None:
        """
        Args:
            group: the pipeline's ranks.
            config: of the model, with `variable_seq_lengths`.
            tokens: of each micro-batch, as many as a stage hands on: its share of a split sequence.
            chunks: model chunks of each stage.
        """
        super().__init__(group, config)
        first, last = group.rank() == 0, group.rank() == group.size() - 1
        order = _order(len(tokens), chunks, config)

        def shapes(edge: bool, place: int) -> _Shapes:
            """Of all passes, but on the pipeline's edge for those through the chunk at this place."""
            passes = (micro_batch for micro_batch, at in order if not (edge and at == place))
            return _Shapes([[tokens[micro_batch], 1, config.hidden_size] for micro_batch in passes])

        # Forward and backward. A pass goes through chunks in the order 0, 1, ..., counted from the end backward.
        self._received = shapes(first, 0), shapes(last, 0)
        self._sent = shapes(last, chunks - 1), shapes(first, chunks - 1)

    def _communicate_shapes(
        self,
        tensor_send_next: torch.Tensor | None,
        tensor_send_prev: torch.Tensor | None,
        recv_prev: bool,
        recv_next: bool,
    ) -> tuple[list[int], list[int]]:
        """Return the shapes of what comes from the stages before and after this one; zeros where nothing does.

        Raises:
            RuntimeError: what is to be sent has another shape than its receiver expects.
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
    """Shapes of one direction's messages, in their order."""

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
            raise RuntimeError(f"a pipeline stage sends {list(tensor.shape)}, and its receiver expects {expected}")


def _order(micro_batches: int, chunks: int, config: TransformerConfig) -> list[tuple[int, int]]:
    """(micro-batch, place of the chunk in a pass) of each pass of a stage; the same forward and backward."""
    if chunks == 1:
        return [(micro_batch, 0) for micro_batch in range(micro_batches)]
    table: Any = get_schedule_table(micro_batches, chunks, config.microbatch_group_size_per_vp_stage)
    return list(table)
