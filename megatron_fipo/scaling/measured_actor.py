"""The actor that trains, with what a measurement needs: random weights, and language modelling to compare with."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_fipo.actor import FIPOActor
from megatron_fipo.algorithm.metrics import Metrics, mean_where
from megatron_fipo.batch import MicroBatch, Rollouts, TrainBatch, plan_micro_batches
from megatron_fipo.convert.load import named_parameters
from megatron_fipo.model.architecture import check_model
from megatron_fipo.model.build import build_policy
from megatron_fipo.model.policy import PolicyModel
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.scaling.measurement import Loss, Measurement

_DEVIATION = 0.02  # of random weights


@dataclass(frozen=True)
class LanguageModelLoss:
    """Cross-entropy of the response tokens, in the form of `PolicyLoss`."""

    topology: Topology

    def __call__(
        self, output: torch.Tensor, micro_batch: MicroBatch, record: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        """`output` is `[2, R_local]`, log-probabilities and entropies. There is nothing to record of a token."""
        losses = -output[0]
        mask = micro_batch.loss_mask
        if self.topology.cp.size() > 1:
            mask = mask[micro_batch.places]
        total = torch.where(mask, losses, 0.0).sum()
        return total, mask.count_nonzero().int(), {"loss": mean_where(losses, mask)}


class MeasuredActor(FIPOActor):
    """Weights are random where model.hf_path has none."""

    def __init__(self, measurement: Measurement, topology: Topology) -> None:
        config = measurement.config
        super().__init__(config, check_model(config), topology)
        if measurement.loss == "lm":
            self.loss = LanguageModelLoss(topology)

    def _make_chunks(self) -> list[PolicyModel]:
        if self.config.model.megatron_path or any(Path(self.config.model.hf_path).glob("*.safetensors")):
            return super()._make_chunks()
        chunks = build_policy(self.arch, self.config, self.topology)
        _draw_weights(chunks, self.arch.tied_embeddings, self.topology)
        return chunks


@torch.no_grad()
def _draw_weights(chunks: list[PolicyModel], tied_embeddings: bool, topology: Topology) -> None:
    """The same on every replica, and of a tied embedding on both stages that hold it."""
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
    """This replica's share of one update: random tokens, dealt and packed as the trainer does it; with the policy's own
    log-probabilities as old ones, as in the first update on a batch."""
    config, topology, sequences = measurement.config, actor.topology, measurement.sequences
    plan = plan_micro_batches(
        sequences.lengths,
        replicas=topology.dp.size(),
        token_budget=config.trainer.tokens_per_micro_batch,
        alignment=topology.sequence_alignment,
        multiple=topology.micro_batch_multiple,
        order=config.trainer.micro_batch_order,
    )[topology.dp.rank()]
    mine = [i for index in plan for i in index]
    rollouts = _random_rollouts(measurement, mine, actor.arch.vocab_size)
    row = {i: n for n, i in enumerate(mine)}
    batch = TrainBatch(tuple(actor.pack(rollouts, [row[i] for i in index]) for index in plan))
    return _with_old_log_probs(batch, actor, measurement.loss)


def _random_rollouts(measurement: Measurement, mine: list[int], vocabulary: int) -> Rollouts:
    """A sequence's tokens follow from its number, whatever the layout."""
    prompts, responses, advantages = [], [], []
    for i in mine:
        generator = torch.Generator().manual_seed(measurement.config.run.seed * 1_000_003 + i)
        length = max(2, measurement.sequences.lengths[i])
        tokens = torch.randint(vocabulary, (length,), generator=generator).tolist()
        prompt = min(length - 1, max(1, round(length * (1 - measurement.sequences.response_share))))
        prompts.append(tokens[:prompt])
        responses.append(tokens[prompt:])
        advantages.append(torch.randn(1, generator=generator))
    rollouts = Rollouts.from_responses(
        ids=mine,
        prompts=prompts,
        responses=responses,
        log_probs=[[0.0] * len(r) for r in responses],
        truncated=[False] * len(mine),
    )
    return rollouts.replace(advantages=torch.cat(advantages)) if mine else rollouts


def _with_old_log_probs(batch: TrainBatch, actor: FIPOActor, loss: Loss) -> TrainBatch:
    if loss == "lm":
        return batch
    old = actor.log_probs(batch)
    batch = batch.with_token_values(old_log_probs=old)
    # The initial policy is the policy.
    return batch.with_token_values(reference_log_probs=old) if actor.initial_weights is not None else batch
