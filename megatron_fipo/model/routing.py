"""Routing of mixtures of experts: which experts the routers of a model chunk choose is recorded, and replayed.

A router of Megatron-Core asks its `router_replay` for the choice. Megatron's own class for that keeps the routers of a
process in one list, with one action for all of them. Here each chunk has its own, a forward pass replays what its
micro-batch carries, and recomputed layers replay what their forward pass had.

Letters: N tokens of a micro-batch on this rank, L expert layers of a chunk, E experts of a layer, K experts of a token.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
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
    """

    chosen: torch.Tensor
    entropy: torch.Tensor
    tokens: torch.Tensor
    sampled: torch.Tensor
    differing: torch.Tensor
    replayed: torch.Tensor
    changed: torch.Tensor


class LayerRouting:
    """The choice of one router.

    Attributes:
        number: of the layer in the whole model, from 0.
        counts: since they were last taken.
    """

    def __init__(self, router: TopKRouter) -> None:
        """Take over the router's choice."""
        taken: Any = router
        self.number: int = taken.layer_number - 1
        self._experts: int = taken.config.num_moe_experts
        self._scores_are_probabilities: bool = taken.config.moe_router_pre_softmax
        self._device = taken.weight.device
        self._replayed: torch.Tensor | None = None
        self._real: torch.Tensor | None = None
        self._records = self._in_forward = False
        self._chosen: torch.Tensor | None = None
        self._to_recompute: deque[torch.Tensor] = deque()
        self.counts = self._no_counts()
        taken.router_replay = self

    def begin(self, replayed: torch.Tensor | None, real: torch.Tensor, records: bool) -> None:
        """Begin a forward pass; `replayed`: `[N, K]`, None where the router chooses; `real`: `[N]`, no padding."""
        self._replayed, self._real, self._records = replayed, real, records
        self._chosen, self._in_forward = None, True

    def end(self, recomputed: bool) -> torch.Tensor:
        """End the forward pass; return its experts, `[N, K]` int64."""
        assert self._chosen is not None
        self._replayed, self._in_forward = None, False
        if recomputed:
            self._to_recompute.append(self._chosen)
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
            experts = self._to_recompute.popleft()
            return scores.gather(1, experts), experts
        assert default_compute_topk is not None
        assert self._real is not None
        values, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self._replayed is None:
            self._chosen = own
        elif self._replayed.shape != own.shape:
            raise ValueError(f"routing of {list(self._replayed.shape)} was recorded, but {list(own.shape)} is needed")
        else:
            self._chosen = self._replayed.long()
            self._count_changes(own, self._chosen)
        if self._records:
            self._count_chosen(scores.detach(), self._chosen)
        return (values if self._replayed is None else scores.gather(1, self._chosen)), self._chosen

    def take_counts(self) -> RoutingCounts:
        """Return the sums since the last call."""
        counts, self.counts = self.counts, self._no_counts()
        return counts

    def _no_counts(self) -> RoutingCounts:
        zeros = torch.zeros(self._experts + 6, dtype=torch.float64, device=self._device)
        return RoutingCounts(zeros[:-6], *zeros[-6:])

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

    def _count_chosen(self, scores: torch.Tensor, chosen: torch.Tensor) -> None:
        assert self._real is not None
        probs = scores.float() if self._scores_are_probabilities else scores.float().softmax(-1)
        self.counts.entropy += (torch.special.entr(probs).sum(-1) * self._real).sum()
        # Not bincount, which waits for a GPU.
        real = self._real[:, None].expand_as(chosen).float()
        self.counts.chosen += torch.zeros_like(probs).scatter(1, chosen, real).sum(0)
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
        self.records = False
        self._dtype = routing_dtype(experts)
        self._recomputed = recomputed
        self._recorded: list[torch.Tensor] = []

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
    def forward(self, replayed: torch.Tensor | None, padding: torch.Tensor) -> Iterator[None]:
        """Stand around the chunk's forward pass.

        Args:
            replayed: `[L, N, K]`; None: the routers choose.
            padding: `[N]` bool.
        """
        for number, layer in enumerate(self.layers):
            layer.begin(None if replayed is None else replayed[number], ~padding, self.records)
        yield
        recomputed = self._recomputed and torch.is_grad_enabled()
        chosen = [layer.end(recomputed).to(self._dtype) for layer in self.layers]
        if self.records:
            self._recorded.append(torch.stack(chosen) if chosen else torch.empty(0))

    def take(self) -> list[torch.Tensor]:
        """Return the choices of the forward passes since the last call, `[L, N, K]` int8 or int16 each, on the host."""
        recorded, self._recorded = self._recorded, []
        return [chosen.cpu() for chosen in recorded]
