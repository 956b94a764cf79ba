"""Three updates of a small policy: by `transformers`, autograd and torch's AdamW on the CPU in float32, and by this
package on the device that there is."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from megatron_fipo.actor import FIPOActor
from megatron_fipo.algorithm import FIPOLossConfig, fipo_loss
from megatron_fipo.batch import MicroBatch, Rollouts, TrainBatch
from megatron_fipo.convert.modules import published_parameters
from tests.actor import references
from tests.support.actors import actor_of, batch_of, gradients_of, in_order, per_micro_batch, weights_of
from tests.support.policies import make_rollouts

Tensors = dict[str, torch.Tensor]
COUNT, UPDATES = 8, 3
# With Adam's usual eps, a weight whose gradient is nearly 0 moves by its sign: rounding would decide.
ADAM = {"lr": 5e-3, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.3, "grad_clip": 0.05}


@dataclass(frozen=True)
class Trained:
    """All on the CPU in float32.

    Attributes:
        log_probs: [R], before the first update; of this data-parallel replica's sequences.
        loss, gradients: of the first update.
        grad_norms: of each update, before clipping.
        weights: after the last update.
        experts: of mixtures of experts by the definition, `[tokens, K]` of each layer and sequence, in every update.
    """

    log_probs: torch.Tensor
    loss: float
    gradients: Tensors
    grad_norms: list[float]
    weights: Tensors
    experts: list[list[torch.Tensor]] | None = None


def rollouts_of(vocab: int = 250) -> Rollouts:
    return make_rollouts(COUNT, vocab=vocab)


def reference(
    path: Path, vocab: int = 250, noise: float = 0.1, replay: bool = False, aux_loss: float = 0.0
) -> tuple[Trained, list[torch.Tensor]]:
    """Train by the definition. Returns the results, and the old log-probabilities of each sequence that were given.

    With `replay` every update computes with the experts that the first weights choose, and `aux_loss` balances them.

    These are the policy's own, moved by `noise`. With 0.1 some tokens are clipped; where results are rounded, others
    would be, and a single one changes the gradient by percents. With 0.01 none is.
    """
    model, rollouts = references.load(path), rollouts_of(vocab)
    with torch.no_grad():
        own = references.token_statistics(model, rollouts)[0]
    experts = references.experts_of(model, rollouts) if replay else None
    generator = torch.Generator().manual_seed(1)
    old = [values - noise * torch.randn(values.shape, generator=generator) for values in own]
    losses: list[float] = []

    def objective(log_probs: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
        loss = _mean_loss(rollouts, log_probs, torch.cat(old))
        losses.append(float(loss.detach()))
        return loss + aux_loss * references.balance_loss(logits, experts) if experts and aux_loss else loss

    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=ADAM["lr"],
        betas=ADAM["betas"],
        eps=ADAM["eps"],
        weight_decay=ADAM["weight_decay"],
    )
    first: Tensors = {}
    norms = []
    for _ in range(UPDATES):
        with references.routers(model, experts) as logits:
            gradients = references.gradients(model, rollouts, objective)
        first = first or _published(model, gradients)
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM["grad_clip"])))
        adamw.step()
    weights = _published(model, {name: p.detach() for name, p in model.named_parameters()})
    return Trained(torch.cat(own), losses[0], first, norms, weights, experts), old


def _published(model: PreTrainedModel, tensors: Tensors) -> Tensors:
    """Return copies of tensors like a model's parameters, by their names in a checkpoint, each expert on its own."""
    other = copy.deepcopy(model)
    for name, parameter in other.named_parameters():
        parameter.data = tensors[name].clone()
    return {name: tensor.detach().clone() for name, tensor in published_parameters(other).items()}


def _mean_loss(rollouts: Rollouts, log_probs: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    masks = rollouts.loss_mask.split(rollouts.lengths.tolist())
    mask = torch.cat([m[p:] for m, p in zip(masks, rollouts.prompt_lengths.tolist(), strict=True)])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), rollouts.response_lengths.cumsum(0)])
    out = fipo_loss(log_probs, old, rollouts.advantages, mask, offsets, FIPOLossConfig(), backend="reference")
    return out.loss_sum / out.num_tokens


def trained(
    path: Path,
    old: list[torch.Tensor],
    vocab: int = 250,
    experts: list[list[torch.Tensor]] | None = None,
    **sections: dict[str, Any],
) -> Trained:
    """Train the same by this package, on the ranks of this process group.

    Args:
        experts: those of each token, as of `Trained`; None: what `moe.routing_replay` says.
        sections: as for `make_config`.
    """
    with actor_of(path, **{"optimizer": ADAM, **sections}) as actor:
        batch = actor.with_old_log_probs(batch_of(actor, rollouts_of(vocab)))
        own = in_order(batch, [m.old_log_probs for m in batch.micro_batches if m.old_log_probs is not None])
        batch = batch.with_token_values(old_log_probs=per_micro_batch(batch, old))
        if experts is not None:
            batch = _with_experts(actor, batch, experts)
        losses, norms, first = [], [], {}
        with actor.training():
            for _ in range(UPDATES):
                with actor.training_step():
                    losses.append(actor.get_loss_and_metrics(batch, forward_only=False)[0])
                    first = first or _on_cpu(gradients_of(actor))
                assert actor.last_update is not None
                norms.append(actor.last_update.grad_norm)
        log_probs = torch.cat([own[i] for i in sorted(own)])
        return Trained(log_probs, losses[0], first, norms, _on_cpu(weights_of(actor)))


def _with_experts(actor: FIPOActor, batch: TrainBatch, experts: list[list[torch.Tensor]]) -> TrainBatch:
    """Return the batch with the given experts of each token to replay, on this rank."""
    topology, result = actor.topology, []
    for m in batch.micro_batches:
        positions = m.position_ids.split([n // topology.cp.size() for n in m.padded_lengths])

        def of_layer(number: int, m: MicroBatch = m, positions: tuple[torch.Tensor, ...] = positions) -> torch.Tensor:
            sequences = [experts[number][i] for i in m.sequence_index.tolist()] or [experts[number][0]]  # all padding
            local = [of[at.clamp(max=len(of) - 1)] for of, at in zip(sequences, positions, strict=True)]
            return torch.cat(local).chunk(topology.tp.size())[topology.tp.rank()]  # sequence parallelism

        routed = [chunk.routing for chunk in actor.chunks if chunk.routing is not None]
        routing = [torch.stack([of_layer(layer.number) for layer in of_chunk.layers]) for of_chunk in routed]
        result.append(m.replace(routing=tuple(r.to(topology.device, torch.uint8) for r in routing)))
    return TrainBatch(tuple(result))


def first_log_ratio(path: Path, vocab: int = 250, **sections: dict[str, Any]) -> float:
    """Return the largest |log-ratio| of an update's first forward pass to the policy's own log-probabilities."""
    with actor_of(path, **sections) as actor, actor.training():
        batch = _own_batch(actor, vocab=vocab)
        with actor.training_step():
            return actor.get_loss_and_metrics(batch, forward_only=False)[1]["log_ratio_abs_max"]


def repeated_gradients(path: Path, **sections: dict[str, Any]) -> tuple[Tensors, Tensors]:
    """Return the gradients of one mini-batch, computed twice."""
    with actor_of(path, **sections) as actor:
        batch = _own_batch(actor, shift=0.1)
        found = []
        for _ in range(2):
            actor.prepare_for_training_step()
            actor.get_loss_and_metrics(batch, forward_only=False)
            found.append(_on_cpu(gradients_of(actor)))
        return found[0], found[1]


def memory_after_updates(path: Path, count: int, **sections: dict[str, Any]) -> list[int]:
    """Return the bytes allocated on the GPU after each of `count` updates on batches of other numbers and lengths."""
    found = []
    with actor_of(path, **sections) as actor, actor.training():
        for seed in range(count):
            batch = batch_of(actor, make_rollouts(3 + seed % 7, seed=seed))
            batch = batch.with_token_values(old_log_probs=actor.log_probs(batch))
            with actor.training_step():
                actor.get_loss_and_metrics(batch, forward_only=False)
            del batch
            found.append(torch.cuda.memory_allocated() if torch.cuda.is_available() else 0)
    return found


def update_without_waiting(path: Path, **sections: dict[str, Any]) -> float:
    """Return the gradient norm of an update whose forward and backward passes may not wait for the GPU."""
    with actor_of(path, **sections) as actor, actor.training():
        batch = _own_batch(actor, shift=0.1)
        with actor.training_step():  # what only a first one does
            actor.get_loss_and_metrics(batch, forward_only=False)
        actor.prepare_for_training_step()
        with _no_waiting():
            actor._run(batch.micro_batches, actor._loss_report, forward_only=False)
            squared = actor.optimizer.squared_norm()
        return actor.optimizer.update(math.sqrt(squared.item())).grad_norm


@contextmanager
def _no_waiting() -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def micro_batches_moved(path: Path, count: int) -> list[str]:
    """Return the fields that `count` micro-batches, moved to the device one after another, do not have as they were."""
    with actor_of(path) as actor:
        sizes = [[i % 8, *range(i % 5)] for i in range(count)]
        before = [actor.pack(rollouts_of(), index) for index in sizes]
        after = [m.to(actor.topology.device) for m in before]
        for size in range(1, 20):  # what is pinned now takes the memory that is free
            torch.full((1000 * size,), 7, pin_memory=torch.cuda.is_available())
        differ = []
        for a, b in zip(before, after, strict=True):
            for name, value in vars(a).items():
                moved = getattr(b, name)
                same = torch.equal(value, moved.cpu()) if isinstance(value, torch.Tensor) else value == moved
                differ += [] if same else [name]
        return differ


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the L2 norm of the difference over that of `expected`."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def relative_errors(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> dict[str, float]:
    assert actual.keys() == expected.keys()
    return {name: relative_error(actual[name], tensor) for name, tensor in expected.items()}


def _own_batch(actor: FIPOActor, shift: float = 0.0, vocab: int = 250) -> TrainBatch:
    batch = actor.with_old_log_probs(batch_of(actor, rollouts_of(vocab)))
    own = [m.old_log_probs for m in batch.micro_batches if m.old_log_probs is not None]
    return batch.with_token_values(old_log_probs=[values - shift for values in own])


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: tensor.detach().float().cpu() for name, tensor in tensors.items()}
