"""Megatron's data-parallel wrapper, optimizer and schedule for the policy, and what happens to a bad gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from megatron_fipo import config as settings
from megatron_fipo.model.policy import PolicyModel
from megatron_fipo.parallel.cpu_backend import cuda_type_names
from megatron_fipo.parallel.topology import Topology


class GradientError(RuntimeError):
    """Too many updates in a row had a non-finite or too large gradient."""


@dataclass(frozen=True)
class UpdateStatistics:
    """One optimizer update. `grad_norm` is the global L2 norm before clipping."""

    grad_norm: float
    lr: float
    skipped: bool


def wrap_for_training(
    chunks: Sequence[PolicyModel], config: settings.OptimizerConfig, topology: Topology
) -> list[DistributedDataParallel]:
    """Wrap each chunk in Megatron's DDP: float32 gradient buffers, reduced once after the last micro-batch."""
    megatron_config = chunks[0].config
    megatron_config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=config.distributed)
    inner = [Float16Module(megatron_config, c) if megatron_config.bf16 else c for c in chunks]
    return [
        DistributedDataParallel(megatron_config, ddp, chunk, disable_bucketing=i > 0, pg_collection=topology.groups)
        for i, chunk in enumerate(inner)
    ]


class PolicyOptimizer:
    """Adam with Megatron's (distributed) optimizer, global-norm clipping, linear warm-up, and skipping of bad steps."""

    def __init__(
        self,
        wrapped: Sequence[DistributedDataParallel],
        config: settings.OptimizerConfig,
        topology: Topology,
    ) -> None:
        self.config = config
        self.wrapped = list(wrapped)
        self.consecutive_skips = 0
        dtype = wrapped[0].config.params_dtype
        with cuda_type_names():
            self.optimizer: MegatronOptimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=config.lr,
                    min_lr=config.lr,
                    weight_decay=config.weight_decay,
                    adam_beta1=config.betas[0],
                    adam_beta2=config.betas[1],
                    adam_eps=config.eps,
                    clip_grad=config.grad_clip,
                    bf16=dtype is torch.bfloat16,
                    params_dtype=dtype,
                    use_distributed_optimizer=config.distributed,
                ),
                self.wrapped,
                use_gloo_process_groups=False,
                pg_collection=topology.groups,
            )
        self.scheduler = _constant_after_warmup(self.optimizer, config)
        self._advance_per_update = config.warmup_unit == "update"

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def zero_grad(self) -> None:
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def update(self) -> UpdateStatistics:
        """Clip and apply the reduced gradients, or skip them if their norm is not finite or above the threshold.

        Raises:
            GradientError: `max_consecutive_skips` updates in a row were skipped.
        """
        with cuda_type_names():
            self.optimizer.prepare_grads()
            grad_norm = float(self.optimizer.get_grad_norm())
            skipped = not math.isfinite(grad_norm) or grad_norm > (self.config.spike_threshold or math.inf)
            if not skipped:
                self.optimizer.step()
        statistics = UpdateStatistics(grad_norm, self.lr, skipped)
        self.consecutive_skips = self.consecutive_skips + 1 if skipped else 0
        if self._advance_per_update:
            self.scheduler.step(1)
        if self.consecutive_skips >= self.config.max_consecutive_skips:
            raise GradientError(
                f"{self.consecutive_skips} updates in a row had a gradient norm that is not finite or above "
                f"optimizer.spike_threshold {self.config.spike_threshold}; the last one was {grad_norm}"
            )
        return statistics

    def finish_step(self) -> None:
        """Advance a schedule that counts training steps."""
        if not self._advance_per_update:
            self.scheduler.step(1)

    def offload_state(self) -> None:
        self.optimizer.offload_to_cpu()

    def restore_state(self) -> None:
        self.optimizer.restore_from_cpu()


def _constant_after_warmup(optimizer: Any, config: settings.OptimizerConfig) -> OptimizerParamScheduler:
    """Linear from 0 (so the very first step has lr 0, as in the authors' code) over `warmup`, then constant."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.lr,
        lr_warmup_steps=config.warmup,
        lr_decay_steps=config.warmup + 1,
        lr_decay_style="constant",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
