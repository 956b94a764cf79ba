"""Mini-batches of a training batch, dealt over replicas: balanced by length, exchanged, packed into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_fipo.batch import MicroBatch, Rollouts, TrainBatch
from megatron_fipo.config import Config
from megatron_fipo.parallel.collectives import gather
from megatron_fipo.parallel.exchange import exchange
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.rollout import derive_seed
from megatron_fipo.shapes.micro_batches import plan_micro_batches

Plan = list[list[list[int]]]  # of one mini-batch: replica -> micro-batch -> response ids


def mini_batch_ids(groups: Sequence[int], step: int, config: Config) -> list[list[int]]:
    """Return the response ids of each mini-batch: `trainer.mini_batch_prompts` x group size, the last may have fewer.

    `trainer.mini_batch_order` "groups" keeps the order of `groups`, so that mini-batches hold whole groups. "mixed"
    orders responses by a seeded hash of (step, id): siblings are spread over the mini-batches, the same in every
    layout. Advantages are those of whole groups in both, since they are computed before.
    """
    size = config.rollout.group_size
    ids = [group * size + i for group in groups for i in range(size)]
    if config.trainer.mini_batch_order == "mixed":
        ids.sort(key=lambda i: (derive_seed(config.run.seed, "mini-batch", step, i), i))
    count = config.trainer.mini_batch_prompts * size
    return [ids[start : start + count] for start in range(0, len(ids), count)]


def distribute(
    rollouts: Rollouts,
    groups: Sequence[int],
    step: int,
    config: Config,
    topology: Topology,
    pack: Callable[[Rollouts, Sequence[int]], MicroBatch],
) -> tuple[Rollouts, list[TrainBatch]]:
    """Cut the batch into mini-batches (`mini_batch_ids`) and deal each over replicas.

    Which response goes where follows from ids and lengths, which all replicas learn first, so every rank makes the
    same plan and one exchange moves everything.

    Args:
        rollouts: what this replica generated of the batch.
        groups: the group numbers of the whole batch.
        step: number of the training step.
        pack: packs sequences of a Rollouts into a micro-batch for this rank.

    Returns:
        The responses that this replica trains on, and one TrainBatch a mini-batch whose `sequence_index` points there.

    Raises:
        ValueError: a response does not fit `trainer.tokens_per_micro_batch`.
    """
    lengths = _lengths_everywhere(rollouts, topology)
    plans = [_plan(ids, lengths, config, topology) for ids in mini_batch_ids(groups, step, config)]
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
