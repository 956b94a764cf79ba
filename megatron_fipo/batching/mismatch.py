"""Mismatch between the engine's and the trainer's log-probabilities: measured every step, corrected if configured.

Its causes: other precision or kernels for the same weights, and weights of an earlier step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_fipo.algorithm import mismatch_metrics, truncated_importance_weights
from megatron_fipo.algorithm.metrics import Metrics, all_reduce, finalize, merge
from megatron_fipo.batch import MicroBatch, Rollouts, TrainBatch
from megatron_fipo.config import RolloutConfig
from megatron_fipo.parallel.topology import Topology


def with_importance_weights(batches: Sequence[TrainBatch], config: RolloutConfig) -> list[TrainBatch]:
    """Add truncated importance weights of every token, where `rollout.correction.importance_sampling` asks for them.

    The batches have their old log-probabilities.
    """
    level = config.importance_sampling_level
    if level == "none":
        return list(batches)

    def weights(m: MicroBatch) -> torch.Tensor:
        assert m.old_log_probs is not None
        return truncated_importance_weights(
            m.old_log_probs,
            m.rollout_log_probs,
            m.loss_mask,
            m.response_offsets,
            level,
            config.correction.importance_sampling_cap,
        )

    return [b.with_token_values(token_weights=[weights(m) for m in b.micro_batches]) for b in batches]


def rollout_mismatch(batches: Sequence[TrainBatch], topology: Topology) -> dict[str, float]:
    """Return metrics of the mismatch over all replicas. Collective.

    Names and meanings are `algorithm.mismatch_metrics`'s; of the histogram the 99.9 % quantile.
    """
    metrics: Metrics = {}
    for m in (m for b in batches for m in b.micro_batches):
        assert m.old_log_probs is not None
        metrics = merge(metrics, mismatch_metrics(m.old_log_probs, m.rollout_log_probs, m.loss_mask))
    values = finalize(all_reduce(metrics, topology.dp))
    left_out = ("ratio_p25", "ratio_median", "ratio_p75", "ratio_p995")
    return {f"mismatch/{name}": value for name, value in values.items() if name not in left_out}


def mismatch_warning(
    mismatch: dict[str, float], rollouts: Rollouts, policy_version: int, config: RolloutConfig, topology: Topology
) -> str | None:
    """Return a warning about a mismatch above `rollout.correction.mismatch_warning`; None below it.

    Collective where it is above, since the versions of all replicas are compared.

    Args:
        policy_version: of the weights that compute the old log-probabilities.
    """
    distance = mismatch["mismatch/abs_mean"]
    if not distance > config.correction.mismatch_warning:
        return None
    versions = rollouts.weight_versions[rollouts.loss_mask].long()
    none = torch.full((1,), -(2**31))  # a replica may have no response
    ends = torch.stack([torch.cat([versions, none]).max(), torch.cat([-versions, none]).max()]).to(topology.device)
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=topology.dp)
    newest, oldest = int(ends[0]), -int(ends[1])
    return (
        f"trainer and rollout engine disagree by {distance:.3g} nats a token (the most: "
        f"{mismatch['mismatch/abs_max']:.3g}). {_versions(oldest, newest, policy_version)} "
        "Other causes: another precision or other kernels (model.dtype, model.fp32_logits); sampling parameters that "
        f"only the engine applies (temperature {config.temperature:g}, top_p {config.top_p:g}, top_k {config.top_k}); "
        "prompts or responses that were tokenized again. `megatron-fipo mismatch CONFIG` reports in which layer they "
        "begin to differ"
    )


def _versions(oldest: int, newest: int, trained: int) -> str:
    if oldest == newest == trained:
        return f"All tokens were sampled with the trained weights (of {trained} steps), so staleness is not the cause."
    sampled = f"{oldest}" if oldest == newest else f"{oldest} to {newest}"
    return f"Tokens were sampled with weights of {sampled} steps and train those of {trained}, which adds to it."
