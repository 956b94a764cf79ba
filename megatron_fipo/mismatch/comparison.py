"""Forward passes of the trainer beside the states of a transformers model, one response at a time.

Two passes a response. In the whole pass differences add up from layer to layer. In the other one each component is
compared alone: it gets the model's state as its input, so that its output differs by its own doing.

Every rank compares the tokens and layers that it holds; only numbers of tokens travel. Letters: T input tokens of a
sequence, R response tokens, L decoder layers, K experts of a token; points as in `model.layer_probe`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from megatron_fipo.actor import FIPOActor
from megatron_fipo.batch import MicroBatch, Rollouts, TrainBatch
from megatron_fipo.model.layer_probe import local_tokens, probed
from megatron_fipo.parallel.collectives import gather_to_first
from megatron_fipo.rollout.layer_states import LayerStates, Rounding, layer_states, relative_difference
from megatron_fipo.shapes.micro_batches import plan_micro_batches

_UNSEEN = -1.0


@dataclass(frozen=True)
class TrainerPass:
    """Forward pass of the trainer beside the model's states; whole, on the host of every rank of the replica.

    Attributes:
        largest: `[L + 2, T]` float64, largest absolute difference of a hidden state; infinite for NaN.
        relative: `[L + 2, T]` float64, length of the difference relative to the model's state; infinite for NaN.
        received: `[L + 1, T]` float64, `relative` of the state that came into each layer and the final norm.
        experts: `[L, T, K]` int64, sorted; None without experts.
        log_probs: `[R]` float32.
    """

    largest: torch.Tensor
    relative: torch.Tensor
    received: torch.Tensor
    experts: torch.Tensor | None
    log_probs: torch.Tensor


@dataclass(frozen=True)
class ComparedResponse:
    """Response under the trainer and under the model.

    Attributes:
        number: its row in the rollouts.
        whole, alone: the trainer's passes.
        experts, log_probs, rounding: the model's, see `LayerStates`.
    """

    number: int
    whole: TrainerPass
    alone: TrainerPass
    experts: torch.Tensor | None
    log_probs: torch.Tensor
    rounding: Rounding


def compare_responses(
    actor: FIPOActor,
    model: PreTrainedModel | None,
    rollouts: Rollouts,
    report: Callable[[int], None] = lambda finished: None,
) -> list[ComparedResponse]:
    """Return all responses, in order, on rank 0; [] elsewhere. Collective.

    Args:
        model: with the policy's weights; needed on the first rank of each replica.
        rollouts: the same on all ranks.
        report: called on all ranks with the number of responses that are compared.
    """
    topology, local = actor.topology, list[ComparedResponse]()
    replicas = topology.dp.size()
    for start in range(0, len(rollouts), replicas):
        number = start + topology.dp.rank()
        compared = _compare(actor, model, rollouts, number if number < len(rollouts) else None)
        if compared is not None and topology.replica.rank() == 0:
            local.append(compared)
        report(min(start + replicas, len(rollouts)))
    return sorted((c for part in gather_to_first(local) for c in part), key=lambda c: c.number)


def packed_log_probs(actor: FIPOActor, rollouts: Rollouts) -> list[torch.Tensor]:
    """Return the trainer's log-probabilities, packed as for updates: one `[R]` a response, on rank 0. Collective."""
    topology, trainer = actor.topology, actor.config.trainer
    plan = plan_micro_batches(
        rollouts.lengths.tolist(),
        replicas=topology.dp.size(),
        token_budget=trainer.tokens_per_micro_batch,
        alignment=topology.sequence_alignment,
        multiple=topology.micro_batch_multiple,
        order=trainer.micro_batch_order,
    )
    batch = TrainBatch(tuple(actor.pack(rollouts, index) for index in plan[topology.dp.rank()]))
    found: dict[int, torch.Tensor] = {}
    for micro_batch, values in zip(batch.micro_batches, actor.log_probs(batch), strict=True):
        responses = values.split(micro_batch.response_offsets.diff().tolist())
        found |= dict(zip(micro_batch.sequence_index.tolist(), responses, strict=True))
    everywhere = {number: values for part in gather_to_first(found) for number, values in part.items()}
    return [everywhere[number] for number in sorted(everywhere)]


def _compare(
    actor: FIPOActor, model: PreTrainedModel | None, rollouts: Rollouts, number: int | None
) -> ComparedResponse | None:
    """Compare this replica's response, on its first rank; without one, take part with padding. Collective."""
    padding = [actor.pack(rollouts, []) for _ in range(actor.topology.micro_batch_multiple - 1)]
    batch = TrainBatch((actor.pack(rollouts, [] if number is None else [number]), *padding))
    batch = batch.without_routing()  # the routers' own choice is compared
    if number is None:
        for _ in range(2):
            actor.log_probs(batch)
        return None
    response = rollouts.select(torch.tensor([number]))
    states = _states(actor, model, response)
    hidden = _shared(actor, None if states is None else states.hidden, response.tokens.numel() - 1)
    whole = _trainer_pass(actor, batch, hidden, alone=False)
    alone = _trainer_pass(actor, batch, hidden, alone=True)
    if states is None:
        return None
    return ComparedResponse(number, whole, alone, states.experts, states.log_probs, states.rounding)


def _states(actor: FIPOActor, model: PreTrainedModel | None, response: Rollouts) -> LayerStates | None:
    """Return the model's states, on the first rank of the replica."""
    if actor.topology.replica.rank() != 0:
        return None
    assert model is not None
    return layer_states(model, response.tokens, int(response.prompt_lengths[0]), actor.config.rollout.temperature)


def _shared(actor: FIPOActor, hidden: torch.Tensor | None, tokens: int) -> torch.Tensor:
    """Return the hidden states of the replica's first rank on all of its ranks. Broadcast over the replica."""
    topology, config = actor.topology, actor.chunks[0].config
    if hidden is None:
        shape = (config.num_layers + 2, tokens, config.hidden_size)
        hidden = torch.empty(shape, dtype=config.params_dtype, device=topology.device)
    dist.broadcast(hidden, dist.get_global_rank(topology.replica, 0), group=topology.replica)
    return hidden


def _trainer_pass(actor: FIPOActor, batch: TrainBatch, hidden: torch.Tensor, alone: bool) -> TrainerPass:
    """Run the trainer over one response and padding micro-batches. Collective."""
    beside = _Beside(actor, batch.micro_batches[0], hidden, alone)
    with actor.routing.recording(), probed(actor.chunks, beside):
        log_probs = actor.log_probs(batch)[0]
    for chunk in actor.chunks:
        if chunk.routing is not None:
            beside.keep_experts([layer.number for layer in chunk.routing.layers], chunk.routing.take()[0].experts)
    return beside.everywhere(log_probs)


class _Beside:
    """Probe of this rank: its tokens of the first micro-batch beside the model's states; `_UNSEEN` elsewhere.

    Args:
        hidden: `[L + 2, T, H]`.
        alone: each layer and the norm get the model's state, and so does the LM head.
    """

    def __init__(self, actor: FIPOActor, micro_batch: MicroBatch, hidden: torch.Tensor, alone: bool) -> None:
        self._hidden, self._alone = hidden, alone
        rows, positions = local_tokens(actor.chunks[0], micro_batch)
        self._rows, self._positions = rows.to(hidden.device), positions.to(hidden.device)
        points, tokens = hidden.shape[:2]
        self._largest, self._relative, self._received = (
            torch.full((points, tokens), _UNSEEN, dtype=torch.float64, device=hidden.device) for _ in range(3)
        )
        self._experts: torch.Tensor | None = None
        experts = actor.arch.experts
        if experts is not None:
            self._experts = torch.full((points - 2, tokens, experts.active), int(_UNSEEN), device=hidden.device)
        self._seen: set[tuple[str, int]] = set()
        self._group = actor.topology.replica

    def entering(self, point: int, hidden: torch.Tensor) -> torch.Tensor:
        """Compare the input, and put the model's state in its place."""
        if self._is_padding("entering", point):
            return hidden
        _, self._received[point, self._positions] = self._differences(point - 1, hidden)
        return self._replaced(point - 1, hidden) if self._alone else hidden

    def leaving(self, point: int, hidden: torch.Tensor) -> torch.Tensor:
        """Compare the state; the LM head gets the model's."""
        if self._is_padding("leaving", point):
            return hidden
        self._largest[point, self._positions], self._relative[point, self._positions] = self._differences(point, hidden)
        is_last = point == len(self._hidden) - 1
        return self._replaced(point, hidden) if self._alone and is_last else hidden

    def keep_experts(self, layers: Sequence[int], chosen: torch.Tensor) -> None:
        """Keep the choices of a chunk, `[its layers, rows, K]`."""
        assert self._experts is not None
        for layer, experts in zip(layers, chosen, strict=True):
            self._experts[layer, self._positions] = experts[self._rows].long().sort(-1).values

    def everywhere(self, log_probs: torch.Tensor) -> TrainerPass:
        """Return the comparisons of all ranks of the replica. All-reduce MAX over it.

        Raises:
            RuntimeError: a token was not compared at some point.
        """
        received = self._received[1:]
        for values in (self._largest, self._relative, received, *([] if self._experts is None else [self._experts])):
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self._group)
            if bool((values == _UNSEEN).any()):
                raise RuntimeError(f"no rank has compared tokens {(values == _UNSEEN).nonzero()[:3].tolist()}")
        return TrainerPass(
            largest=self._largest.cpu(),
            relative=self._relative.cpu(),
            received=received.cpu(),
            experts=None if self._experts is None else self._experts.cpu(),
            log_probs=log_probs,
        )

    def _is_padding(self, side: str, point: int) -> bool:
        """Return whether this micro-batch is a later one than the first."""
        known = (side, point) in self._seen
        self._seen.add((side, point))
        return known

    def _differences(self, point: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the largest and the relative difference of each token, infinite for NaN, which MAX may lose."""
        found, expected = hidden[self._rows, 0], self._hidden[point, self._positions]
        largest = (found.double() - expected.double()).abs().amax(-1)
        return torch.nan_to_num(largest, nan=torch.inf, posinf=torch.inf), relative_difference(found, expected)

    def _replaced(self, point: int, hidden: torch.Tensor) -> torch.Tensor:
        replaced = hidden.clone()
        replaced[self._rows, 0] = self._hidden[point, self._positions]
        return replaced
