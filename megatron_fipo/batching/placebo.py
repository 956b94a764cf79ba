"""Permuted influence weights of a mini-batch over all replicas, the same in every layout and packing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_fipo.algorithm import permute_weights
from megatron_fipo.batch import Rollouts, TrainBatch
from megatron_fipo.parallel.exchange import all_gather_rows
from megatron_fipo.parallel.topology import Topology


def with_placebo_weights(
    batch: TrainBatch, influence: Sequence[torch.Tensor], rollouts: Rollouts, seed: int, topology: Topology
) -> TrainBatch:
    """Return this replica's share of a mini-batch with permuted influence weights. Collective over data parallelism.

    The weights of all replicas are put in the order of response ids, permuted, and each replica takes its own. So which
    token gets whose weight follows from the seed, ids, lengths and strata.

    Args:
        influence: `FIPOActor.influence` of each micro-batch, [2, R].
        rollouts: the responses that `sequence_index` points to.
    """
    ids = torch.cat([rollouts.ids[m.sequence_index] for m in batch.micro_batches])  # [S]
    lengths = torch.cat([m.response_offsets.diff() for m in batch.micro_batches])
    values = torch.cat(list(influence), dim=1)  # [2, N]
    responses = torch.cat(all_gather_rows(torch.stack([ids, lengths], dim=1), topology.dp, topology.device))
    everyone = torch.cat(all_gather_rows(values.T.contiguous(), topology.dp, topology.device))  # [all N, 2]
    order = responses[:, 0].argsort()
    offsets = torch.cat([responses.new_zeros(1), responses[:, 1].cumsum(0)])
    ordered = everyone[_positions(offsets[:-1][order], responses[:, 1][order])]
    permuted = permute_weights(ordered[:, 0], ordered[:, 1], seed)
    starts = torch.cat([responses.new_zeros(1), responses[:, 1][order].cumsum(0)])[:-1]
    local = permuted[_positions(starts[torch.searchsorted(responses[:, 0][order], ids)], lengths)]
    sizes = [m.num_response_positions for m in batch.micro_batches]
    return batch.with_token_values(influence_weights=local.split(sizes))


def _positions(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return the indices of the ranges `start .. start + length`, one after another."""
    return torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths) + torch.arange(int(lengths.sum()))
