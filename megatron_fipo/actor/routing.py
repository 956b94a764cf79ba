"""Routing of a policy's experts over a step: recorded with the old log-probabilities, replayed in updates, measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_fipo.batch import MicroBatch, TrainBatch
from megatron_fipo.config import Config
from megatron_fipo.model.policy import PolicyModel
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.shapes.architecture import Architecture


class PolicyRouting:
    """Routing of the policy's model chunks on this rank; without experts it does nothing."""

    def __init__(self, chunks: Sequence[PolicyModel], arch: Architecture, config: Config, topology: Topology) -> None:
        self._chunks = [chunk.routing for chunk in chunks if chunk.routing is not None]
        self._arch = arch
        self._replay = config.moe.routing_replay
        self._device = topology.device
        self._token_ranks = topology.tp if config.parallel.sequence else None

    def of_this_rank(self, micro_batch: MicroBatch) -> MicroBatch:
        """Return a micro-batch of `batch.pack` with this rank's share of its routing, if it has any.

        Raises:
            ValueError: it is the routing of another model.
        """
        if micro_batch.routing is None:
            return micro_batch
        (routing,) = micro_batch.routing
        experts = self._arch.experts
        expected = (self._arch.num_layers, experts.active if experts else 0)
        if (len(routing), routing.shape[2]) != expected:
            raise ValueError(
                f"responses have routing for {len(routing)} layers and {routing.shape[2]} experts of a token, but the "
                f"model has {expected[0]} layers and {expected[1]} experts of a token"
            )
        return micro_batch.replace(routing=tuple(c.of_this_chunk(routing, self._token_ranks) for c in self._chunks))

    @contextlib.contextmanager
    def recording(self, batch: TrainBatch) -> Iterator[None]:
        """Stand around the computation of the old log-probabilities of a batch.

        Raises:
            ValueError: the rollout engine's routing is to be replayed, and the batch has none.
        """
        if self._replay == "rollout" and any(len(m.advantages) and m.routing is None for m in batch.micro_batches):
            raise ValueError(
                "moe.routing_replay=rollout, but the rollout engine returned no experts with its responses"
            )
        for chunk in self._chunks:
            chunk.records = True
        yield
        for chunk in self._chunks:
            chunk.records = False

    def with_recorded(self, batch: TrainBatch) -> TrainBatch:
        """Return the batch with the routing that was recorded for it, where updates replay that."""
        recorded = list(zip(*(chunk.take() for chunk in self._chunks), strict=True))
        if self._replay != "update":
            return batch
        return TrainBatch(tuple(m.replace(routing=r) for m, r in zip(batch.micro_batches, recorded, strict=True)))

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the tokens that were counted since the last call; {} without experts.

        Collective over all ranks. Each token is counted by one of the ranks that hold a layer: experts need sequence
        parallelism where tensor parallelism is used.
        """
        if self._arch.experts is None:
            return {}
        experts = self._arch.experts.count
        sums = torch.zeros(self._arch.num_layers, experts + 6, dtype=torch.float64, device=self._device)
        for layer in (layer for chunk in self._chunks for layer in chunk.layers):
            counts = layer.take_counts()
            numbers = (counts.entropy, counts.tokens, counts.sampled, counts.differing, counts.replayed, counts.changed)
            sums[layer.number] = torch.cat([counts.chosen, torch.stack(numbers)])
        dist.all_reduce(sums)
        chosen = sums[:, :experts].cpu()
        entropy, tokens, sampled, differing, replayed, changed = sums[:, experts:].cpu().unbind(1)
        load = chosen / (tokens * self._arch.experts.active / experts)[:, None]  # 1: its even share
        return {
            "moe/load_max": float(load.max()),
            "moe/load_max_mean": float(load.max(dim=1).values.mean()),
            "moe/idle_experts": float((chosen == 0).double().mean()),
            "moe/entropy": float((entropy / tokens).mean()),
            "moe/entropy_min": float((entropy / tokens).min()),
            **_shares("moe/rollout_changed", differing, sampled),
            **_shares("moe/replayed_changed", changed, replayed),
        }


def _shares(name: str, changed: torch.Tensor, compared: torch.Tensor) -> dict[str, float]:
    """Return the share of tokens with another choice, over all layers and of the worst; {} if none were compared."""
    if not float(compared.sum()):
        return {}
    return {name: float(changed.sum() / compared.sum()), f"{name}_max": float((changed / compared).max())}
