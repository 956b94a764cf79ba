"""Dealing a training batch over replicas: balanced by length, one exchange, packed into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_fipo.batch import MicroBatch, Rollouts, TrainBatch
from megatron_fipo.config import Config
from megatron_fipo.parallel.collectives import gather
from megatron_fipo.parallel.exchange import exchange
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.shapes.micro_batches import plan_micro_batches

Plan = list[list[list[int]]]  # of one mini-batch: replica -> micro-batch -> response ids


def distribute(
    rollouts: Rollouts,
    groups: Sequence[int],
    config: Config,
    topology: Topology,
    pack: Callable[[Rollouts, Sequence[int]], MicroBatch],
) -> tuple[Rollouts, list[TrainBatch]]:
    """Cut the batch into mini-batches of `trainer.mini_batch_prompts` groups, in order, and deal each over replicas.

    Which response goes where follows from ids and lengths, which all replicas learn first, so every rank makes the
    same plan and one exchange moves everything.

    Args:
        rollouts: what this replica generated of the batch.
        groups: the group numbers of the whole batch.
        pack: packs sequences of a Rollouts into a micro-batch for this rank.

    Returns:
        The responses that this replica trains on, and one TrainBatch a mini-batch whose `sequence_index` points there.

    Raises:
        ValueError: a response does not fit `trainer.tokens_per_micro_batch`.
    """
    lengths = _lengths_everywhere(rollouts, topology)
    size, step = config.rollout.group_size, config.trainer.mini_batch_prompts
    ids = [group * size + i for group in groups for i in range(size)]
    cuts = range(0, len(ids), step * size)
    plans = [_plan(ids[cut : cut + step * size], lengths, config, topology) for cut in cuts]
    local = _exchange(rollouts, plans, topology)
    row = {int(i): n for n, i in enumerate(local.ids)}
    replica = topology.dp.rank()
    return local, [TrainBatch(tuple(pack(local, [row[i] for i in bin_]) for bin_ in plan[replica])) for plan in plans]


def _lengths_everywhere(rollouts: Rollouts, topology: Topology) -> dict[int, int]:
    """Tokens of each response of the batch, by id. All-gather over the data-parallel group."""
    gathered = gather((rollouts.ids.tolist(), rollouts.lengths.tolist()), topology.dp)
    return {i: n for ids, lengths in gathered for i, n in zip(ids, lengths, strict=True)}


def _plan(ids: Sequence[int], lengths: dict[int, int], config: Config, topology: Topology) -> Plan:
    plan = plan_micro_batches(
        [lengths[i] for i in ids],
        replicas=topology.dp.size(),
        token_budget=config.trainer.tokens_per_micro_batch,
        alignment=topology.sequence_alignment,
        multiple=topology.micro_batch_multiple,
        order=config.trainer.micro_batch_order,
    )
    return [[[ids[place] for place in bin_] for bin_ in replica] for replica in plan]


def _exchange(rollouts: Rollouts, plans: Sequence[Plan], topology: Topology) -> Rollouts:
    """Send each response to the replica that trains on it."""
    owner = {i: r for plan in plans for r, bins in enumerate(plan) for bin_ in bins for i in bin_}
    owners = torch.tensor([owner[int(i)] for i in rollouts.ids], dtype=torch.int64)
    parts = [rollouts.select((owners == r).nonzero().squeeze(1)) for r in range(topology.dp.size())]
    return Rollouts.concatenate(exchange(parts, topology.dp, topology.device))
