"""Megatron's data-parallel wrapper, optimizer and schedule for the policy, and what happens to a bad gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from megatron_fipo import config as settings
from megatron_fipo.actor.gradients import clip, finalize_gradients, squared_norm
from megatron_fipo.actor.offload import HostState, Slot
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


@dataclass(frozen=True)
class ParameterState:
    """Optimizer state of the part of one model parameter that this rank updates.

    Attributes:
        parameter: the model's parameter.
        start: flat index in it of the part's first element; the part is contiguous.
        main: the numbers that Adam updates, float32; in a float32 model they may be the parameter's own memory.
        moments: `exp_avg` and `exp_avg_sq`, as large as `main`.
    """

    parameter: torch.nn.Parameter
    start: int
    main: torch.Tensor
    moments: dict[str, torch.Tensor]


def wrap_for_training(
    chunks: Sequence[PolicyModel], config: settings.OptimizerConfig, topology: Topology
) -> list[DistributedDataParallel]:
    """Wrap each chunk in Megatron's DDP: float32 gradient buffers, reduced once after the last micro-batch.

    `overlap_grad_reduce` stays off: DDP would wait for the LM head's gradient from autograd, which gets none.
    """
    megatron_config = chunks[0].config
    megatron_config.finalize_model_grads_func = finalize_gradients
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
        self.device = topology.device
        self._host = HostState(topology.device)
        dtype = wrapped[0].config.params_dtype
        with cuda_type_names(), _adam_of(wrapped[0].config.transformer_impl):
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
    def squared_norm(self) -> torch.Tensor:
        """Make the reduced gradients ready for `update` and return their squared global L2 norm, 0-dim on the device.

        Collective over all ranks.
        """
        self._host.wait()
        with cuda_type_names():
            self.optimizer.prepare_grads()
        return squared_norm(self.optimizer.chained_optimizers)

    @torch.no_grad()
    def update(self, grad_norm: float) -> UpdateStatistics:
        """Clip and apply the gradients, or skip them if their norm is not finite or above the threshold.

        Args:
            grad_norm: the root of what `squared_norm` has returned for these gradients.

        Raises:
            GradientError: `max_consecutive_skips` updates in a row were skipped.
        """
        with cuda_type_names():
            skipped = not math.isfinite(grad_norm) or grad_norm > (self.config.spike_threshold or math.inf)
            if not skipped:
                if self.config.grad_clip > 0:
                    clip((p for part in self._parts() for p in part.get_parameters()), self.config.grad_clip, grad_norm)
                self.optimizer.step_with_ready_grads()
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

    def parameter_states(self) -> Iterator[ParameterState]:
        """Yield Adam's state on this rank, made as zeros where no update has made it yet, as the first update would."""
        self._host.wait()
        for optimizer in self._parts():
            for parameter, start, main in _updated(optimizer):
                state = optimizer.optimizer.state[main]
                if "exp_avg" not in state:
                    state |= {"exp_avg": torch.zeros_like(main.data), "exp_avg_sq": torch.zeros_like(main.data)}
                if _counts_by_parameter(optimizer):
                    state.setdefault("step", torch.tensor(0.0))
                yield ParameterState(parameter, start, main, {n: state[n] for n in ("exp_avg", "exp_avg_sq")})

    def counters(self) -> dict[str, int]:
        """Return the numbers of applied updates (Adam's bias correction), schedule steps, and skips in a row."""
        return {
            "updates": self._updates(),
            "schedule": int(self.scheduler.num_steps),
            "consecutive_skips": self.consecutive_skips,
        }

    def set_counters(self, counters: Mapping[str, int]) -> None:
        """Go on from what `counters` gave, at the rates that this optimizer was configured with."""
        for optimizer in self._parts():
            for _, _, main in _updated(optimizer) if _counts_by_parameter(optimizer) else ():
                # One tensor each: updates count in place, and a shared one would be counted once a parameter.
                optimizer.optimizer.state[main]["step"] = torch.tensor(float(counters["updates"]))
            for group in () if _counts_by_parameter(optimizer) else optimizer.optimizer.param_groups:
                group["step"] = counters["updates"]
        self.consecutive_skips = counters["consecutive_skips"]
        self.scheduler.num_steps = counters["schedule"]
        self.scheduler.step(0)

    def _updates(self) -> int:
        counts = set()
        for optimizer in self._parts():
            if _counts_by_parameter(optimizer):
                counts |= {int(s["step"]) for s in optimizer.optimizer.state.values() if "step" in s}
            else:
                counts |= {int(g["step"]) for g in optimizer.optimizer.param_groups if "step" in g and g["params"]}
        assert len(counts) <= 1, f"parameters were updated {counts} times: Adam's updates are of all or none"
        return counts.pop() if counts else 0

    def _parts(self) -> list[Any]:
        """Megatron's optimizers of dense and of expert parameters, those with something to update."""
        return [o for o in self.optimizer.chained_optimizers if o.optimizer is not None]

    def offload_state(self) -> None:
        """Adam's state to host memory; gradient buffers, empty between two phases of updates, are freed."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            self._host.offload(list(self._slots()))
        for chunk in self.wrapped:
            chunk.offload_grad_buffers(synchronize=on_gpu, empty_cache=on_gpu)

    def restore_state(self) -> None:
        """Begin to bring back what `offload_state` moved; the next update waits for it on the device."""
        if self.device.type == "cuda":
            self._host.restore(list(self._slots()))
        for chunk in self.wrapped:
            chunk.restore_grad_buffers(synchronize=False)

    def _slots(self) -> Iterator[Slot]:
        """Adam's moments and the float32 parameters that it updates, unless they are the model's own.

        Counts of updates stay in host memory, where torch's Adam keeps and reads them: on the GPU each read would wait
        for the device, twice a parameter.
        """
        own = {p.untyped_storage().data_ptr() for chunk in self.wrapped for p in chunk.parameters()}
        for part in self._parts():
            for main in (p for group in part.optimizer.param_groups for p in group["params"]):
                if main.untyped_storage().data_ptr() not in own:
                    yield Slot(partial(getattr, main, "data"), partial(setattr, main, "data"))
                state = part.optimizer.state.get(main, {})
                for name in (n for n, value in state.items() if isinstance(value, torch.Tensor) and n != "step"):
                    yield Slot(partial(state.__getitem__, name), partial(state.__setitem__, name))


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


@contextmanager
def _adam_of(implementation: str) -> Iterator[None]:
    """Inside, Megatron builds torch's AdamW for a model of torch's layers ("local").

    It would take Transformer Engine's Adam wherever that is installed. Where apex is installed instead, apex's stays.
    """
    before = megatron_optimizer.USING_PYTORCH_OPTIMIZER
    if implementation == "local" and megatron_optimizer.Adam.__module__.startswith("transformer_engine."):
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = True
    try:
        yield
    finally:
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = before


def _counts_by_parameter(optimizer: Any) -> bool:
    """torch's Adam counts updates in each parameter's state, Transformer Engine's and apex's in the groups."""
    return isinstance(optimizer.optimizer, torch.optim.Adam)


def _updated(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, int, torch.Tensor]]:
    """Each parameter that has a part on this rank, the part's flat start, and the tensor that is updated for it."""
    groups = optimizer.optimizer.param_groups
    if isinstance(optimizer, DistributedOptimizer):
        for parameter, (group, place) in optimizer.model_param_group_index_map.items():
            start = optimizer._get_model_param_range_map(parameter)["param"].start
            yield parameter, start, groups[group]["params"][place]
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        for models, mains in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
            yield from ((model, 0, main) for model, main in zip(models, mains, strict=True))
        yield from ((p, 0, p) for parameters in optimizer.fp32_from_fp32_groups for p in parameters)
    else:
        yield from ((p, 0, p) for group in groups for p in group["params"])
