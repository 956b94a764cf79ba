"""Routing of mixtures of experts: which experts the routers of a model chunk choose is recorded, and replayed.

A router of Megatron-Core asks its `router_replay` for the choice. Megatron's own class for that keeps the routers of a
process in one list, with one action for all of them. Here each chunk has its own, a forward pass replays what its
micro-batch carries, and recomputed layers replay what their forward pass had.

Letters: N tokens of a micro-batch on this rank, L expert layers of a chunk, K experts of a token.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter

TopK = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class LayerRouting:
    """The choice of one router.

    Attributes:
        chosen: `[N, K]` experts of the forward pass in progress or, behind it, of the last one; None: there was none.
    """

    def __init__(self) -> None:
        self.chosen: torch.Tensor | None = None
        self._replayed: torch.Tensor | None = None
        self._in_forward = False
        self._to_recompute: deque[torch.Tensor] = deque()

    @contextlib.contextmanager
    def forward(self, replayed: torch.Tensor | None, recomputed: bool) -> Iterator[None]:
        """Stand around a forward pass; `replayed`: `[N, K]`, None where the router chooses."""
        self.chosen, self._replayed, self._in_forward = None, replayed, True
        yield
        self._replayed, self._in_forward = None, False
        if recomputed and self.chosen is not None:
            self._to_recompute.append(self.chosen)

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
            scores: `[N, experts]`.

        Raises:
            ValueError: what is to be replayed is of other tokens, or of another number of experts.
        """
        experts = self._replayed if self._in_forward else self._to_recompute.popleft()
        if experts is None:
            assert default_compute_topk is not None
            values, experts = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        elif experts.shape != (len(scores), topk):
            raise ValueError(f"routing of {list(experts.shape)} was recorded, but {[len(scores), topk]} is needed")
        else:
            experts = experts.long()
            values = scores.gather(1, experts)
        if self._in_forward:
            self.chosen = experts
        return values, experts


class ChunkRouting:
    """The choices of a model chunk's routers, in the order of its layers.

    Attributes:
        records: keep the choices of the forward passes to come.
    """

    def __init__(self, chunk: torch.nn.Module, experts: int, recomputed: bool) -> None:
        """Take over the routers' choices.

        Args:
            experts: of a layer.
            recomputed: the backward pass repeats each layer's forward pass.
        """
        self.layers: list[LayerRouting] = []
        for module in chunk.modules():
            if isinstance(module, TopKRouter):
                self.layers.append(LayerRouting())
                router: Any = module
                router.router_replay = self.layers[-1]
        self.records = False
        self._dtype = torch.uint8 if experts <= 256 else torch.int16
        self._recomputed = recomputed
        self._recorded: list[torch.Tensor] = []

    @contextlib.contextmanager
    def forward(self, replayed: torch.Tensor | None) -> Iterator[None]:
        """Stand around the chunk's forward pass; `replayed`: `[L, N, K]`, None where the routers choose."""
        recomputed = self._recomputed and torch.is_grad_enabled()
        with contextlib.ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                stack.enter_context(layer.forward(None if replayed is None else replayed[number], recomputed))
            yield
        if self.records:
            self._recorded.append(self._compact())

    def _compact(self) -> torch.Tensor:
        chosen = [layer.chosen for layer in self.layers]
        return torch.stack([c.to(self._dtype) for c in chosen if c is not None]) if chosen else torch.empty(0)

    def take(self) -> list[torch.Tensor]:
        """Return the choices of the forward passes since the last call, `[L, N, K]` uint8 or int16 each."""
        recorded, self._recorded = self._recorded, []
        return recorded
