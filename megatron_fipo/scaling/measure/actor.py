"""The training actor for measurements, with optional random weights and language-modelling loss."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_fipo.actor import FIPOActor
from megatron_fipo.algorithm.metrics import Metrics, mean_where
from megatron_fipo.batch import MicroBatch, Rollouts, TrainBatch
from megatron_fipo.batching.random_rollouts import random_routing
from megatron_fipo.convert.load import named_parameters
from megatron_fipo.model.build import build_policy
from megatron_fipo.model.check import check_model
from megatron_fipo.model.policy import PolicyModel
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.scaling.measure.specification import Loss, Measurement
from megatron_fipo.shapes.architecture import Architecture
from megatron_fipo.shapes.micro_batches import plan_micro_batches

_DEVIATION = 0.02  # standard deviation of random weights


@dataclass(frozen=True)
class LanguageModelLoss:
    """Cross-entropy of the response tokens, with the interface of `PolicyLoss`."""

    topology: Topology

    def __call__(
        self, output: torch.Tensor, micro_batch: MicroBatch, record: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        """Return loss sum, token count and metrics. `output`: `[2, R_local]` log-probabilities and entropies."""
        losses = -output[0]
        mask = micro_batch.loss_mask
        if self.topology.cp.size() > 1:
            mask = mask[micro_batch.response_index]
        total = torch.where(mask, losses, 0.0).sum()
        return total, mask.count_nonzero().int(), {"loss": mean_where(losses, mask)}


class MeasuredActor(FIPOActor):
    """Actor whose weights are random if model.hf_path has none."""

    def __init__(self, measurement: Measurement, topology: Topology) -> None:
        config = measurement.config
        super().__init__(config, check_model(config), topology)
        if measurement.loss == "lm":
            self.loss = LanguageModelLoss(topology)

    def _make_chunks(self) -> list[PolicyModel]:
        if self.config.model.megatron_path or any(Path(self.config.model.hf_path).glob("*.safetensors")):
            return super()._make_chunks()
        chunks = build_policy(self.arch, self.config, self.topology)
        _init_weights(chunks, self.arch.tied_embeddings, self.topology)
        return chunks


@torch.no_grad()
def _init_weights(chunks: list[PolicyModel], tied_embeddings: bool, topology: Topology) -> None:
    """Initialize equally on every replica, and a tied embedding equally on both stages that hold it."""
    for name, parameter in named_parameters(chunks):
        if name == "output_layer.weight" and tied_embeddings:
            name = "embedding.word_embeddings.weight"
        sharded = getattr(parameter, "tensor_model_parallel", False)
        generator = torch.Generator(parameter.device).manual_seed(
            zlib.crc32(f"{name} {topology.tp.rank() if sharded else 0}".encode())
        )
        if parameter.dim() > 1:
            parameter.normal_(std=_DEVIATION, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)  # norms


def make_batch(measurement: Measurement, actor: FIPOActor) -> TrainBatch:
    """Return this replica's share of one update: random tokens, distributed and packed as in training.

    Old log-probabilities are the policy's own, as in the first update on a batch.
    """
    config, topology, sequences = measurement.config, actor.topology, measurement.sequences
    plan = plan_micro_batches(
        sequences.lengths,
        replicas=topology.dp.size(),
        token_budget=config.trainer.tokens_per_micro_batch,
        alignment=topology.sequence_alignment,
        multiple=topology.micro_batch_multiple,
        order=config.trainer.micro_batch_order,
    )[topology.dp.rank()]
    local_ids = [i for index in plan for i in index]
    rollouts = _random_rollouts(measurement, local_ids, actor.arch)
    row = {i: n for n, i in enumerate(local_ids)}
    batch = TrainBatch(tuple(actor.pack(rollouts, [row[i] for i in index]) for index in plan))
    return _with_old_log_probs(batch, actor, measurement.loss)


def _random_rollouts(measurement: Measurement, local_ids: list[int], arch: Architecture) -> Rollouts:
    """Generate rollouts; a sequence's tokens, and experts where an engine's are replayed, depend only on its index."""
    prompts, responses, advantages, routing = [], [], [], list[torch.Tensor]()
    routed = measurement.config.moe.routing_replay == "rollout"
    for i in local_ids:
        generator = torch.Generator().manual_seed(measurement.config.run.seed * 1_000_003 + i)
        length = max(2, measurement.sequences.lengths[i])
        tokens = torch.randint(arch.vocab_size, (length,), generator=generator).tolist()
        prompt = min(length - 1, max(1, round(length * (1 - measurement.sequences.response_share))))
        prompts.append(tokens[:prompt])
        responses.append(tokens[prompt:])
        advantages.append(torch.randn(1, generator=generator))
        if routed:
            routing.append(random_routing(length - 1, arch, generator))
    rollouts = Rollouts.from_responses(
        ids=local_ids,
        prompts=prompts,
        responses=responses,
        log_probs=[[0.0] * len(r) for r in responses],
        truncated=[False] * len(local_ids),
        routing=routing or None,
    )
    return rollouts.replace(advantages=torch.cat(advantages)) if local_ids else rollouts


def _with_old_log_probs(batch: TrainBatch, actor: FIPOActor, loss: Loss) -> TrainBatch:
    if loss == "lm" and not actor.config.moe.aux_loss:
        return batch
    batch = actor.with_old_log_probs(batch)
    if actor.initial_weights is None:
        return batch
    # The reference policy is the policy itself.
    old = [m.old_log_probs for m in batch.micro_batches if m.old_log_probs is not None]
    return batch.with_token_values(reference_log_probs=old)
