"""From the last stage's token statistics to the loss of one micro-batch, as sums for Megatron's schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from megatron_fipo.algorithm import FIPOLossConfig, LossOutput, aggregate_tokens, fipo_loss, grpo_loss, placebo_loss
from megatron_fipo.algorithm.loss_metrics import clip_side_metrics
from megatron_fipo.algorithm.metrics import Metrics, mean_where
from megatron_fipo.batch import MicroBatch
from megatron_fipo.config import AlgorithmConfig
from megatron_fipo.parallel.context import gather_tokens
from megatron_fipo.parallel.topology import Topology


class Loss(Protocol):
    """Loss of the last stage's output of a micro-batch, as `PolicyLoss` is."""

    def __call__(
        self, output: torch.Tensor, micro_batch: MicroBatch, record: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Metrics]: ...


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of one micro-batch: FIPO or GRPO, plus the optional KL penalty and entropy bonus."""

    algorithm: AlgorithmConfig
    config: FIPOLossConfig
    topology: Topology

    def __call__(
        self, output: torch.Tensor, micro_batch: MicroBatch, record: list[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        """(loss sum, denominator, metrics) of the micro-batch, in the form that Megatron's per-token loss expects.

        `output` is `[2, R_local]`, log-probabilities and entropies. Under context parallelism each rank has the loss
        of its local chunks of every sequence, exact through the carries that the ranks exchange; Megatron adds sums and
        denominators up over the data- and context-parallel ranks. What the loss made of each token, `[K, R]` as
        `credit.RECORDED` names it, is appended to `record`.
        """
        log_probs, entropy = output.unbind()
        assert micro_batch.old_log_probs is not None
        mask = self._local(micro_batch.loss_mask, micro_batch)
        out = self._loss_output(log_probs, micro_batch)
        if record is not None:
            record.append(self._token_values(log_probs, out, micro_batch))
        clip = self.config.clip_ratio_low, self.config.clip_ratio_high
        log_ratio = log_probs.detach() - self._local(micro_batch.old_log_probs, micro_batch)
        sides = clip_side_metrics(log_ratio, self._advantage_of_tokens(micro_batch), mask, *clip)
        metrics = {**out.metrics, **sides, "entropy": mean_where(entropy, mask)}
        loss_sum = out.loss_sum
        if self.algorithm.entropy_coefficient:
            bonus = aggregate_tokens(entropy, mask, micro_batch.segment_offsets, out, self.config)
            loss_sum = loss_sum - self.algorithm.entropy_coefficient * bonus
        if micro_batch.reference_log_probs is not None:
            # k3: never negative, and its value is unbiased for KL(policy || reference). Its gradient is not: on average
            # over the policy's tokens it is that of KL(reference || policy). Beyond the clamp it is 0.
            shift = self._local(micro_batch.reference_log_probs, micro_batch) - log_probs
            shift = shift.clamp(-self.config.log_ratio_clamp, self.config.log_ratio_clamp)
            penalty = shift.exp() - shift - 1
            total = aggregate_tokens(penalty, mask, micro_batch.segment_offsets, out, self.config)
            loss_sum = loss_sum + self.algorithm.kl_coefficient * total
            metrics["reference_kl"] = mean_where(penalty, mask)
        return loss_sum, out.denominator.int(), metrics

    def influence(self, output: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        """Return FIPO's influence weights and the strata of `permute_weights`: `[2, R]`, on all context ranks.

        `output` as for the loss. Collective over the context-parallel group.
        """
        out = self._loss_output(output[0].detach(), micro_batch, fipo_loss)
        vetoed = self._of_tokens(out.vetoed, micro_batch)
        signs = self._advantage_of_tokens(micro_batch).sign()
        in_loss = self._local(micro_batch.loss_mask, micro_batch) & ~vetoed
        return self._gathered([out.influence_weights, torch.where(in_loss, signs, 0.0)], micro_batch)

    def _loss_output(
        self, log_probs: torch.Tensor, micro_batch: MicroBatch, loss_function: Callable[..., LossOutput] | None = None
    ) -> LossOutput:
        """Compute the loss of `algorithm`, or the given one, of this rank's segments."""
        assert micro_batch.old_log_probs is not None
        sharded = self.topology.cp.size() > 1
        return (loss_function or self._loss_function(micro_batch))(
            log_probs,
            self._local(micro_batch.old_log_probs, micro_batch),
            micro_batch.advantages.repeat_interleave(2) if sharded else micro_batch.advantages,
            self._local(micro_batch.loss_mask, micro_batch),
            micro_batch.segment_offsets,
            self.config,
            None if micro_batch.token_weights is None else self._local(micro_batch.token_weights, micro_batch),
            group=self.topology.cp if sharded else None,
            layout="zigzag",
        )

    def _loss_function(self, micro_batch: MicroBatch) -> Callable[..., LossOutput]:
        if self.algorithm.loss == "grpo":
            return grpo_loss
        if self.algorithm.influence == "fipo":
            return fipo_loss
        if micro_batch.influence_weights is None:
            raise ValueError("algorithm.influence=placebo requires a micro-batch with permuted influence weights")
        return partial(placebo_loss, influence_weights=self._local(micro_batch.influence_weights, micro_batch))

    def _token_values(self, log_probs: torch.Tensor, out: LossOutput, micro_batch: MicroBatch) -> torch.Tensor:
        """[K, R]: of all positions on every context-parallel rank. One all-reduce."""
        kinds = [log_probs.detach()]
        if self.algorithm.loss == "fipo":
            kinds += [out.future_kl, out.influence_weights]
        return self._gathered(kinds, micro_batch)

    def _gathered(self, kinds: Sequence[torch.Tensor], micro_batch: MicroBatch) -> torch.Tensor:
        """K x [R_local] -> [K, R]: the positions of all context-parallel ranks."""
        size = micro_batch.num_response_positions
        index = torch.cat([micro_batch.response_index + kind * size for kind in range(len(kinds))])
        return gather_tokens(torch.cat(list(kinds)), index, len(kinds) * size, self.topology.cp).view(len(kinds), size)

    def _advantage_of_tokens(self, micro_batch: MicroBatch) -> torch.Tensor:
        """[R_local]: each token's advantage."""
        sharded = self.topology.cp.size() > 1
        return self._of_tokens(
            micro_batch.advantages.repeat_interleave(2) if sharded else micro_batch.advantages, micro_batch
        )

    def _of_tokens(self, of_segments: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        """[S * K] -> [R_local]: each token has its segment's value."""
        sizes = micro_batch.segment_offsets.diff()
        return of_segments.repeat_interleave(sizes, output_size=micro_batch.targets.numel())

    def _local(self, values: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        """[R] -> [R_local]: the positions that this context-parallel rank holds."""
        return values if self.topology.cp.size() == 1 else values[micro_batch.response_index]
