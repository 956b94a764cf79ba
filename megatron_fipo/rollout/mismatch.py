"""The distance between what the engine sampled from and what is trained: watched every step, corrected where asked.

Two things make it: the same weights computed otherwise (precision, kernels), and weights of an earlier step.
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
    """How far the engine's log-probabilities are from the trainer's, over all replicas. Collective.

    Names and meanings are `algorithm.mismatch_metrics`'s; of the histogram the 99.9 % quantile.
    """
    metrics: Metrics = {}
    for m in (m for b in batches for m in b.micro_batches):
        assert m.old_log_probs is not None
        metrics = merge(metrics, mismatch_metrics(m.old_log_probs, m.rollout_log_probs, m.loss_mask))
    values = finalize(all_reduce(metrics, topology.dp))
    others = ("_ratio_p25", "_ratio_median", "_ratio_p75", "_ratio_p995")
    return {f"mismatch/{name}": value for name, value in values.items() if not name.endswith(others)}


def mismatch_warning(
    mismatch: dict[str, float], rollouts: Rollouts, policy_version: int, config: RolloutConfig, topology: Topology
) -> str | None:
    """Return a warning about a mismatch above `rollout.correction.mismatch_warning`; None below it.

    Collective where it is above, since the versions of all replicas are compared.

    Args:
        policy_version: of the weights that compute the old log-probabilities.
    """
    distance = mismatch["mismatch/rollout_mismatch_abs"]
    if not distance > config.correction.mismatch_warning:
        return None
    drawn_by = rollouts.weight_versions[rollouts.loss_mask].long()
    none = torch.full((1,), -(2**31))  # a replica may have no response
    ends = torch.stack([torch.cat([drawn_by, none]).max(), torch.cat([-drawn_by, none]).max()]).to(topology.device)
    dist.all_reduce(ends, dist.ReduceOp.MAX, group=topology.dp)
    newest, oldest = int(ends[0]), -int(ends[1])
    return (
        f"trainer and rollout engine disagree by {distance:.3g} nats a token (the most: "
        f"{mismatch['mismatch/rollout_mismatch_abs_max']:.3g}). {_versions(oldest, newest, policy_version)} "
        "Other causes: another precision or other kernels (model.dtype, model.fp32_logits); sampling parameters that "
        f"only the engine applies (temperature {config.temperature:g}, top_p {config.top_p:g}, top_k {config.top_k}); "
        "prompts or responses tokenized anew on the way"
    )


def _versions(oldest: int, newest: int, trained: int) -> str:
    if oldest == newest == trained:
        return f"All tokens were drawn by the weights that are trained (of {trained} steps), so staleness is not it."
    drawn = f"{oldest}" if oldest == newest else f"{oldest} to {newest}"
    return f"Tokens were drawn by weights of {drawn} steps and are trained by those of {trained}: this adds to it."
