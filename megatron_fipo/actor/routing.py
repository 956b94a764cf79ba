"""Routing of a policy's experts over a step: recorded with the old log-probabilities, replayed, balanced, measured."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_fipo.batch import MicroBatch, TrainBatch
from megatron_fipo.config import Config
from megatron_fipo.model.policy import PolicyModel
from megatron_fipo.model.routing import RecordedRouting
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.shapes.architecture import Architecture


class PolicyRouting:
    """Routing of the policy's model chunks on this rank; without experts it does nothing.

    Attributes:
        layers: of the last call of `metrics`, one row a layer of the model: its number, the load of each expert as a
            multiple of its even share, and the layer's own values of the metrics; NaN where nothing was compared.
    """

    layers: Sequence[dict[str, Any]] = ()

    def __init__(self, chunks: Sequence[PolicyModel], arch: Architecture, config: Config, topology: Topology) -> None:
        self._chunks = [chunk.routing for chunk in chunks if chunk.routing is not None]
        self._arch = arch
        self._replay = config.moe.routing_replay
        self._coefficient = config.moe.aux_loss
        self._aggregation = config.algorithm.aggregation
        self._topology = topology
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
    def recording(self) -> Iterator[None]:
        """Stand around forward passes whose choices are recorded and counted."""
        for chunk in self._chunks:
            chunk.records = True
        yield
        for chunk in self._chunks:
            chunk.records = False

    def check_sampled(self, batch: TrainBatch) -> None:
        """Check that a batch has the rollout engine's routing, where that is to be replayed.

        Raises:
            ValueError: it has none.
        """
        if self._replay == "rollout" and any(len(m.advantages) and m.routing is None for m in batch.micro_batches):
            raise ValueError(
                "moe.routing_replay=rollout, but the rollout engine returned no experts with its responses"
            )

    def with_recorded(self, batch: TrainBatch) -> TrainBatch:
        """Return the batch with what updates need of the forward passes that were recorded on it.

        With `moe.routing_replay=update` the experts of each token; with `moe.aux_loss` each expert's load in the whole
        mini-batch, for which this is collective over all ranks.
        """
        recorded = [chunk.take() for chunk in self._chunks]
        micro_batches = list(batch.micro_batches)
        if self._replay == "update":
            # On the host: a step's batches have many tokens.
            experts = zip(*([r.experts.cpu() for r in of_chunk] for of_chunk in recorded), strict=True)
            micro_batches = [m.replace(routing=e) for m, e in zip(micro_batches, experts, strict=True)]
        if self._coefficient:
            load, tokens = self._expert_load(recorded)
            # Backward computes the gradient of the loss's sum over the mini-batch, which is divided by the denominator.
            # A rank without layers has no tokens that were given to experts, and no loss.
            weight = self._coefficient * self._denominator(micro_batches) / (tokens or math.inf)
            micro_batches = [m.replace(expert_load=load, aux_loss_weight=weight) for m in micro_batches]
        return TrainBatch(tuple(micro_batches))

    def check(self, batch: TrainBatch) -> None:
        """Check that an update has what it needs.

        Raises:
            ValueError: it has not.
        """
        if self._coefficient and any(m.expert_load is None for m in batch.micro_batches):
            raise ValueError(
                "moe.aux_loss requires a mini-batch with the load of its experts: call with_old_log_probs first"
            )

    def _expert_load(self, recorded: Sequence[Sequence[RecordedRouting]]) -> tuple[tuple[torch.Tensor, ...], float]:
        """Return each expert's tokens over those of an even distribution, and the number of all tokens.

        Both are of all micro-batches and replicas: `[L, E]` for each chunk; 0 tokens on a rank without layers.
        """
        assert self._arch.experts is not None
        assigned = [torch.stack([r.tokens for r in of_chunk]).sum(0, dtype=torch.float64) for of_chunk in recorded]
        for of_chunk in filter(len, assigned):
            # The ranks of a stage: each token is on one of them.
            dist.all_reduce(of_chunk, group=self._topology.groups.tp_dp_cp)
        load = tuple((a / a.mean(1, keepdim=True)).float() for a in assigned)
        given = next((float(of_chunk[0].sum()) for of_chunk in assigned if len(of_chunk)), 0.0)
        return load, given / self._arch.experts.active

    def _denominator(self, micro_batches: Sequence[MicroBatch]) -> float:
        """Return what the loss of the whole mini-batch is divided by if no sequence is vetoed: tokens, or sequences."""
        count = torch.zeros((), dtype=torch.float64, device=self._topology.device)
        for m in micro_batches:
            if self._aggregation == "token-mean":
                count += m.loss_mask.sum()
            else:
                before = torch.cat([m.loss_mask.new_zeros(1, dtype=torch.int64), m.loss_mask.cumsum(0)])
                count += (before[m.response_offsets].diff() > 0).sum()
        dist.all_reduce(count, group=self._topology.dp)
        return float(count)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the tokens that were counted since the last call; {} without experts.

        Collective over all ranks. Each token is counted by one of the ranks that hold a layer: experts need sequence
        parallelism where tensor parallelism is used.
        """
        if self._arch.experts is None:
            return {}
        experts = self._arch.experts.count
        sums = torch.zeros(self._arch.num_layers, experts + 8, dtype=torch.float64, device=self._topology.device)
        for layer in (layer for chunk in self._chunks for layer in chunk.layers):
            counts = layer.take_counts()
            compared = (counts.sampled, counts.differing, counts.replayed, counts.changed)
            numbers = (counts.entropy, counts.tokens, *compared, counts.aux_loss, counts.balanced)
            sums[layer.number] = torch.cat([counts.chosen, torch.stack(numbers)])
        dist.all_reduce(sums)
        chosen = sums[:, :experts].cpu()
        entropy, tokens, sampled, differing, replayed, changed, *balance = sums[:, experts:].cpu().unbind(1)
        load = chosen / (tokens * self._arch.experts.active / experts)[:, None]  # 1: its even share
        aux_loss, balanced = balance
        columns = {
            "layer": range(len(load)),
            "load": load.tolist(),
            "entropy": (entropy / tokens).tolist(),
            "rollout_changed": (differing / sampled).tolist(),
            "replayed_changed": (changed / replayed).tolist(),
        }
        self.layers = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return {
            "moe/load_max": float(load.max()),
            "moe/load_max_mean": float(load.max(dim=1).values.mean()),
            "moe/idle_experts": float((chosen == 0).double().mean()),
            "moe/entropy": float((entropy / tokens).mean()),
            "moe/entropy_min": float((entropy / tokens).min()),
            **({"moe/aux_loss": float((aux_loss / balanced).mean())} if float(balanced.sum()) else {}),
            **_shares("moe/rollout_changed", differing, sampled),
            **_shares("moe/replayed_changed", changed, replayed),
        }


def _shares(name: str, changed: torch.Tensor, compared: torch.Tensor) -> dict[str, float]:
    """Return the share of tokens with another choice, over all layers and of the worst; {} if none were compared."""
    if not float(compared.sum()):
        return {}
    return {name: float(changed.sum() / compared.sum()), f"{name}_max": float((changed / compared).max())}
