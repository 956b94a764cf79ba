"""The actor's state as Megatron's sharded tensors: saved by one layout, loaded by any other.

Weights go by Megatron's own description. Adam's state follows the weights': every rank describes the numbers that it
updates as boxes of the whole tensor. So ranks write what they hold, nothing is gathered, and the file is the same
with and without the distributed optimizer. Megatron's own format for the distributed optimizer collects the state of
all data-parallel ranks on each of them, and cannot load before a first update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensorFactory

from megatron_fipo.actor import random_states
from megatron_fipo.actor.actor import FIPOActor
from megatron_fipo.actor.optimizer import ParameterState
from megatron_fipo.convert.distributed import STACKED_LAYERS, fill_chunks
from megatron_fipo.convert.load import named_parameters
from megatron_fipo.parallel.topology import Topology

OPTIONAL = ("optimizer.state.fp32_param.", "initial.")  # keys of what a checkpoint may lack, see `restore`
Sharded: TypeAlias = ShardedTensor | ShardedTensorFactory
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes along each axis


def sharded_state(actor: FIPOActor, *, loading: bool) -> dict[str, Any]:
    """Return the actor's state as `dist_checkpointing` saves it, or fills it when it loads.

    Weights are handed to `restore`, all the rest is loaded in place: into Adam's state, the initial policy's weights
    and, under `random`, separate tensors. `random` has a row for each rank, so that it fits only as many ranks.
    """
    model = {str(n): chunk.sharded_state_dict(metadata=dict(STACKED_LAYERS)) for n, chunk in enumerate(actor.chunks)}
    weights = {id(value.data): value for value in nested_values(model) if not isinstance(value, ShardedObject)}
    _share_out(weights.values(), actor.topology)
    state = {
        "model": model,
        "optimizer": _optimizer_state(actor, weights),
        "initial": _initial_weights(actor, weights),
        "random": random_states.sharded(actor.topology.rank, actor.topology.world_size),
    }
    if not loading:
        state |= {"content_metadata": STACKED_LAYERS, "counters": actor.optimizer.counters()}
    return state


@torch.no_grad()
def restore(actor: FIPOActor, loaded: Mapping[str, Any]) -> None:
    """Put into the actor what was loaded for `sharded_state(actor, loading=True)`.

    A float32 model's checkpoint has no separate main parameters: they are then the weights. One of a run without
    KL penalty has no initial weights: the actor's own stay. Without `random`, random states stay as they are.
    """
    fill_chunks(actor.chunks, loaded["model"])
    has_mains = bool(loaded.get("optimizer", {}).get("fp32_param"))
    for state in actor.optimizer.parameter_states():
        if not has_mains:
            state.main.copy_(_updated_part(state).view_as(state.main))
    actor.optimizer.set_counters(loaded["counters"])
    if "random" in loaded:
        random_states.restore(loaded["random"])


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Yield the boxes of a tensor that hold its flat elements `start..stop`, in order; at most 3 for a matrix."""
    if start == stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # within one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> Iterator[Box]:
    for offsets, sizes in boxes(shape[1:], start, stop):
        yield (row, *offsets), (1, *sizes)


def _share_out(weights: Iterable[Sharded], topology: Topology) -> None:
    """Data-parallel replicas hold the same weights, and Megatron has the first write them. Let each write as many."""
    loads = {True: [0] * topology.groups.expt_dp.size(), False: [0] * topology.dp_cp.size()}
    for weight in weights:
        load = loads[not getattr(weight.data, "allreduce", True)]  # Megatron's mark of an expert's parameter
        writer = load.index(min(load))
        *others, replica = weight.replica_id
        if not any(others):
            load[writer] += weight.data.nbytes
        weight.replica_id = (*others, (replica - writer) % len(load))


def _optimizer_state(actor: FIPOActor, weights: Mapping[int, Sharded]) -> dict[str, Any]:
    state: dict[str, Any] = {"exp_avg": {}, "exp_avg_sq": {}, "fp32_param": {}}
    for number, part in enumerate(actor.optimizer.parameter_states()):
        values = dict(part.moments)
        if part.parameter.dtype != part.main.dtype:
            values["fp32_param"] = part.main
        for name, tensor in values.items():
            pieces = _pieces(weights[id(part.parameter)], f"optimizer.state.{name}", part.start, tensor.data)
            if actor.config.optimizer.distributed:
                pieces = [_held_once(piece) for piece in pieces]
            state[name] |= {f"{number}.{n}": piece for n, piece in enumerate(pieces)}
    return state


def _initial_weights(actor: FIPOActor, weights: Mapping[int, Sharded]) -> dict[str, ShardedTensor]:
    pieces: list[ShardedTensor] = []
    if actor.initial_weights is None:
        return {}
    for (_, parameter), values in zip(named_parameters(actor.chunks), actor.initial_weights, strict=True):
        pieces += _pieces(weights[id(parameter)], "initial", 0, values)
    return {str(n): piece for n, piece in enumerate(pieces)}


def _pieces(weight: Sharded, prefix: str, start: int, values: torch.Tensor) -> list[ShardedTensor]:
    """`values`, which belong to the weight's flat elements from `start` on, as boxes of the whole tensor."""
    flat = values.view(-1)
    stop = start + flat.numel()
    pieces = []
    for part, part_start in _contiguous_parts(weight):
        inside = max(start, part_start), min(stop, part_start + math.prod(part.local_shape))
        taken = inside[0] - start
        if inside[0] >= inside[1]:
            continue
        for offsets, sizes in boxes(part.local_shape, inside[0] - part_start, inside[1] - part_start):
            pieces.append(_piece(part, prefix, offsets, sizes, flat[taken : taken + math.prod(sizes)]))
            taken += math.prod(sizes)
    return pieces


def _contiguous_parts(weight: Sharded) -> Iterable[tuple[ShardedTensor, int]]:
    """Return the sharded tensors that a weight is stored as, and where each starts in it.

    Gate and up projections, which are one weight here, are stored as the halves of one tensor.
    """
    if isinstance(weight, ShardedTensor):
        return [(weight, 0)]
    parts = list(nested_values(weight.build()))
    first = weight.data.storage_offset()
    assert all(part.data.is_contiguous() for part in parts)
    return [(part, part.data.storage_offset() - first) for part in parts]


def _piece(
    part: ShardedTensor, prefix: str, offsets: Sequence[int], sizes: Sequence[int], values: torch.Tensor
) -> ShardedTensor:
    leading = part.prepend_axis_num
    inner = zip(part.global_offset[leading:], offsets, strict=True)
    shape = (*[1] * leading, *sizes)
    return ShardedTensor(
        key=f"{prefix}.{part.key}",
        data=values.view(shape),
        dtype=values.dtype,
        local_shape=shape,
        global_shape=part.global_shape,
        global_offset=(*part.global_offset[:leading], *(a + b for a, b in inner)),
        axis_fragmentations=None,  # boxes are no regular grid
        replica_id=part.replica_id,
        allow_shape_mismatch=part.allow_shape_mismatch,
    )


def _held_once(piece: ShardedTensor) -> ShardedTensor:
    """Data-parallel ranks hold different parts of the state, not copies of the same."""
    piece.replica_id = (*piece.replica_id[:2], 0)
    return piece


def _updated_part(state: ParameterState) -> torch.Tensor:
    return state.parameter.view(-1)[state.start : state.start + state.main.numel()]
