"""From the last stage's token statistics to the loss of one micro-batch, as sums for Megatron's schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_fipo.algorithm import FIPOLossConfig, aggregate_tokens, fipo_loss, grpo_loss
from megatron_fipo.algorithm.metrics import Metrics, mean_where
from megatron_fipo.batch import MicroBatch
from megatron_fipo.config import AlgorithmConfig
from megatron_fipo.parallel.context import gather_tokens
from megatron_fipo.parallel.topology import Topology


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of one micro-batch: FIPO or GRPO, plus the optional KL penalty and entropy bonus."""

    algorithm: AlgorithmConfig
    config: FIPOLossConfig
    topology: Topology

    def token_statistics(self, output: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        """`[2, R_local] -> [2, R]`: log-probabilities and entropies of all response positions of the micro-batch."""
        size, group = micro_batch.num_response_positions, self.topology.cp
        return torch.stack([gather_tokens(row, micro_batch.places, size, group) for row in output.unbind()])

    def __call__(self, output: torch.Tensor, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        """(loss sum, denominator, metrics) of the micro-batch, in the form that Megatron's per-token loss expects.

        Every context-parallel rank computes the whole loss, since each needs the gradient of its own tokens; the
        denominator is counted by the first one only, because Megatron adds it up over the group.
        """
        assert micro_batch.old_log_probs is not None
        log_probs, entropy = self.token_statistics(output, micro_batch)
        loss_function = fipo_loss if self.algorithm.loss == "fipo" else grpo_loss
        out = loss_function(
            log_probs,
            micro_batch.old_log_probs,
            micro_batch.advantages,
            micro_batch.loss_mask,
            micro_batch.response_offsets,
            self.config,
            micro_batch.token_weights,
        )
        metrics = {**out.metrics, "entropy": mean_where(entropy, micro_batch.loss_mask)}
        loss_sum = out.loss_sum
        if self.algorithm.entropy_coefficient:
            bonus = self._aggregate(entropy, micro_batch, out.vetoed)
            loss_sum = loss_sum - self.algorithm.entropy_coefficient * bonus
        if micro_batch.reference_log_probs is not None:
            shift = micro_batch.reference_log_probs - log_probs
            penalty = shift.exp() - shift - 1  # k3: unbiased for KL(policy || reference), never negative
            loss_sum = loss_sum + self.algorithm.kl_coefficient * self._aggregate(penalty, micro_batch, out.vetoed)
            metrics["reference_kl"] = mean_where(penalty, micro_batch.loss_mask)
        denominator = out.denominator if self.topology.cp.rank() == 0 else torch.zeros_like(out.denominator)
        return loss_sum, denominator.int(), metrics

    def _aggregate(self, values: torch.Tensor, micro_batch: MicroBatch, vetoed: torch.Tensor) -> torch.Tensor:
        return aggregate_tokens(values, micro_batch.loss_mask, micro_batch.response_offsets, vetoed, self.config)
