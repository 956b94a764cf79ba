"""Routing of mixtures of experts: which experts the routers of a model chunk choose is recorded, and replayed.

A router of Megatron-Core asks its `router_replay` for the choice. Megatron's own class for that keeps the routers of a
process in one list, with one action for all of them. Here each chunk has its own, a forward pass replays what its
micro-batch carries, and recomputed layers replay what their forward pass had.

The auxiliary loss of a layer is that of the Switch Transformer over a whole mini-batch: E x sum over experts of f x P,
where f is an expert's share of the chosen ones and P its mean probability, both over the mini-batch's tokens without
padding. f is known before the update, so the loss is a sum over tokens, of which each micro-batch of each rank adds its
own: nothing depends on how the mini-batch is cut. Megatron's own takes f from one micro-batch, or from those before.

Letters: N tokens of a micro-batch on this rank, L expert layers of a chunk, E experts of a layer, K experts of a token.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from megatron_fipo.batch import routing_dtype

TopK = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass
class RoutingCounts:
    """Sums over the tokens that a router has seen on this rank, without padding; float64 on the device.

    Attributes:
        chosen: `[E]` how often each expert was computed with, where choices were recorded.
        entropy: sum of the entropies of the router's distributions over experts there, nats.
        tokens: number of tokens there.
        sampled: number of those with replayed experts, which are the rollout engine's.
        differing: number of those for which the router would have chosen other experts.
        replayed: number of tokens with replayed experts elsewhere, which is in updates.
        changed: number of those for which the router would have chosen other experts.
        aux_loss: sum of the tokens' auxiliary losses, without coefficient.
        balanced: number of tokens there.
    """

    chosen: torch.Tensor
    entropy: torch.Tensor
    tokens: torch.Tensor
    sampled: torch.Tensor
    differing: torch.Tensor
    replayed: torch.Tensor
    changed: torch.Tensor
    aux_loss: torch.Tensor
    balanced: torch.Tensor


class Balancing(NamedTuple):
    """The auxiliary loss of one layer for the tokens of a micro-batch.

    Attributes:
        load: `[E]` E x f.
        weight: of a token's loss in the sum whose gradient backward computes.
        real: `[N]` bool, no padding.
    """

    load: torch.Tensor
    weight: float
    real: torch.Tensor

    def loss(self, probs: torch.Tensor) -> torch.Tensor:
        """Return the sum of the tokens' losses for the router's distributions `[N, E]`, without the weight."""
        return torch.where(self.real, probs @ self.load, 0.0).sum()


class RecordedRouting(NamedTuple):
    """The experts of a chunk's forward pass.

    Attributes:
        experts: `[L, N, K]` int8 or int16.
        tokens: `[L, E]` float32, how many tokens each was given, without padding.
    """

    experts: torch.Tensor
    tokens: torch.Tensor


class LayerRouting:
    """The choice of one router.

    Attributes:
        number: of the layer in the whole model, from 0.
        tokens: `[E]` float32, how many tokens each expert was given in the last recorded forward pass, without padding.
        counts: since they were last taken.
    """

    tokens: torch.Tensor

    def __init__(self, router: TopKRouter) -> None:
        """Take over the router's choice."""
        taken: Any = router
        self.number: int = taken.layer_number - 1
        self._experts: int = taken.config.num_moe_experts
        self._scores_are_probabilities: bool = taken.config.moe_router_pre_softmax
        self._device = taken.weight.device
        self._replayed: torch.Tensor | None = None
        self._real: torch.Tensor | None = None
        self._balancing: Balancing | None = None
        self._records = self._in_forward = False
        self._chosen: torch.Tensor | None = None
        self._to_recompute: deque[tuple[torch.Tensor, Balancing | None]] = deque()
        self.counts = self._no_counts()
        taken.router_replay = self

    def begin(
        self, replayed: torch.Tensor | None, real: torch.Tensor, records: bool, balancing: Balancing | None
    ) -> None:
        """Begin a forward pass; `replayed`: `[N, K]`, None where the router chooses; `real`: `[N]`, no padding."""
        self._replayed, self._real, self._records, self._balancing = replayed, real, records, balancing
        self._chosen, self._in_forward = None, True

    def end(self, recomputed: bool) -> torch.Tensor:
        """End the forward pass; return its experts, `[N, K]` int64."""
        assert self._chosen is not None
        self._replayed, self._in_forward = None, False
        if recomputed:
            self._to_recompute.append((self._chosen, self._balancing))
        return self._chosen

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: TopK | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores and the experts of each token, `[N, K]` each; called by Megatron's router.

        Args:
            scores: `[N, E]`.

        Raises:
            ValueError: what is to be replayed is of other tokens, or of another number of experts.
        """
        if not self._in_forward:
            experts, balancing = self._to_recompute.popleft()
            return self._balanced(scores.gather(1, experts), scores, balancing), experts
        assert default_compute_topk is not None
        assert self._real is not None
        values, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self._replayed is None:
            self._chosen = own
        elif self._replayed.shape != own.shape:
            raise ValueError(f"routing of {list(self._replayed.shape)} was recorded, but {list(own.shape)} is needed")
        else:
            self._chosen = self._replayed.long()
            values = scores.gather(1, self._chosen)
            self._count_changes(own, self._chosen)
        if self._records:
            self._count_chosen(scores.detach(), self._chosen)
        return self._balanced(values, scores, self._balancing), self._chosen

    def take_counts(self) -> RoutingCounts:
        """Return the sums since the last call."""
        counts, self.counts = self.counts, self._no_counts()
        return counts

    def _no_counts(self) -> RoutingCounts:
        zeros = torch.zeros(self._experts + 8, dtype=torch.float64, device=self._device)
        return RoutingCounts(zeros[:-8], *zeros[-8:])

    def _count_changes(self, own: torch.Tensor, replayed: torch.Tensor) -> None:
        assert self._real is not None
        changed = (own.sort(-1).values != replayed.sort(-1).values).any(-1)
        tokens, changes = self._real.sum(), (changed & self._real).sum()
        if self._records:
            self.counts.sampled += tokens
            self.counts.differing += changes
        else:
            self.counts.replayed += tokens
            self.counts.changed += changes

    def _probabilities(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.float() if self._scores_are_probabilities else scores.float().softmax(-1)

    def _balanced(self, values: torch.Tensor, scores: torch.Tensor, balancing: Balancing | None) -> torch.Tensor:
        """Return the values, whose backward pass adds the gradient of the auxiliary loss.

        A layer that is going to be recomputed has no gradients now, and gets it when it is.
        """
        if balancing is None or not torch.is_grad_enabled():
            return values
        loss = balancing.loss(self._probabilities(scores))
        self.counts.aux_loss += loss.detach()
        self.counts.balanced += balancing.real.sum()
        balanced: torch.Tensor = MoEAuxLossAutoScaler.apply(values, balancing.weight * loss)
        return balanced

    def _count_chosen(self, scores: torch.Tensor, chosen: torch.Tensor) -> None:
        assert self._real is not None
        # Not bincount, which waits for a GPU.
        real = self._real[:, None].expand_as(chosen).float()
        self.tokens = real.new_zeros(len(chosen), self._experts).scatter(1, chosen, real).sum(0)
        self.counts.entropy += (torch.special.entr(self._probabilities(scores)).sum(-1) * self._real).sum()
        self.counts.chosen += self.tokens
        self.counts.tokens += self._real.sum()


class ChunkRouting:
    """The choices of a model chunk's routers, in the order of its layers.

    Attributes:
        records: keep and count the choices of the forward passes to come.
    """

    def __init__(self, chunk: torch.nn.Module, experts: int, recomputed: bool) -> None:
        """Take over the routers' choices.

        Args:
            experts: of a layer.
            recomputed: the backward pass repeats each layer's forward pass.
        """
        self.layers = [LayerRouting(module) for module in chunk.modules() if isinstance(module, TopKRouter)]
        config: Any = chunk.config
        self._experts, self._active = experts, config.moe_router_topk
        self.records = False
        self._dtype = routing_dtype(experts)
        self._recomputed = recomputed
        self._recorded: list[RecordedRouting] = []

    def of_this_chunk(self, routing: torch.Tensor, sequence_parallel: dist.ProcessGroup | None) -> torch.Tensor:
        """Return this chunk's share of a micro-batch's routing, `[L, N, K]`.

        Args:
            routing: `[layers of the model, tokens of this context-parallel rank, K]`.
            sequence_parallel: its ranks have a part of the tokens each.
        """
        layers = routing[[layer.number for layer in self.layers]]
        if sequence_parallel is None:
            return layers
        return layers.chunk(sequence_parallel.size(), dim=1)[sequence_parallel.rank()]

    @contextlib.contextmanager
    def forward(
        self, replayed: torch.Tensor | None, padding: torch.Tensor, load: torch.Tensor | None, weight: float
    ) -> Iterator[None]:
        """Stand around the chunk's forward pass.

        Args:
            replayed: `[L, N, K]`; None: the routers choose.
            padding: `[N]` bool.
            load: `[L, E]`, of the auxiliary loss, as of `Balancing`; None: there is none, as without gradients.
            weight: the same.
        """
        load, real = load if torch.is_grad_enabled() else None, ~padding
        for number, layer in enumerate(self.layers):
            balancing = None if load is None else Balancing(load[number], weight, real)
            layer.begin(None if replayed is None else replayed[number], real, self.records, balancing)
        yield
        recomputed = self._recomputed and torch.is_grad_enabled()
        chosen = [layer.end(recomputed).to(self._dtype) for layer in self.layers]
        if self.records and self.layers:
            tokens = torch.stack([layer.tokens for layer in self.layers])
            self._recorded.append(RecordedRouting(torch.stack(chosen), tokens))
        elif self.records:  # a pipeline layout may leave a chunk without layers
            shape = 0, len(padding), self._active
            chosen_of_none = torch.empty(shape, dtype=self._dtype, device=padding.device)
            self._recorded.append(RecordedRouting(chosen_of_none, torch.empty(0, self._experts, device=padding.device)))

    def take(self) -> list[RecordedRouting]:
        """Return the choices of the forward passes since the last call."""
        recorded, self._recorded = self._recorded, []
        return recorded
