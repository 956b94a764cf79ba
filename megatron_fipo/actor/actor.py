"""The actor: a policy on Megatron ranks, driven by NeMo-Aligner's verbs.

Each prepare/finish pair is also a context manager (`training()`, `training_step()`, `inference()`), so that a pair
cannot be split. Letters: B sequences, S tokens of a padded row, R response positions of a micro-batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_fipo.actor.credit import RECORDED
from megatron_fipo.actor.digest import digest
from megatron_fipo.actor.interface import AlignableGenerativeInterface
from megatron_fipo.actor.loss import Loss, PolicyLoss
from megatron_fipo.actor.optimizer import PolicyOptimizer, UpdateStatistics, wrap_for_training
from megatron_fipo.actor.pipeline import Pipeline, Report
from megatron_fipo.actor.routing import PolicyRouting
from megatron_fipo.algorithm import loss_config
from megatron_fipo.algorithm.metrics import Mean, Metrics, all_reduce, finalize, merge
from megatron_fipo.batch import MicroBatch, Rollouts, TrainBatch, pack
from megatron_fipo.config import Config
from megatron_fipo.convert.export import export_weights
from megatron_fipo.convert.load import named_parameters
from megatron_fipo.convert.policy import load_policy
from megatron_fipo.model.architecture import Architecture
from megatron_fipo.model.policy import PolicyModel
from megatron_fipo.parallel.collectives import any_rank, broadcast
from megatron_fipo.parallel.context import gather_tokens
from megatron_fipo.parallel.topology import Topology


class Engine(Protocol):
    """Rollout engine that `infer` generates with."""

    @property
    def held_version(self) -> int: ...

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None: ...

    def generate(self, *args: Any, **kwargs: Any) -> Any: ...

    def release(self) -> None: ...


_SQUARED_NORM = "grad_norm_squared"  # among an update's metrics on their way to the host
Recorder = Callable[[int, bool], contextlib.AbstractContextManager[None]]


def _unrecorded(micro_batches: int, forward_only: bool) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


class FIPOActor(AlignableGenerativeInterface):
    """Policy's model chunks and optimizer on this rank. All methods are collective over all ranks.

    Attributes:
        recorder: `with recorder(micro_batches, forward_only):` stands around every run of the pipeline's schedule.
        routing: of the model's experts, if it has any.
    """

    def __init__(
        self, config: Config, arch: Architecture, topology: Topology, engine: Engine | None = None, read: bool = True
    ) -> None:
        """Build the policy and read its weights, unless a checkpoint is loaded into it next (not `read`).

        Raises:
            ValueError: the checkpoint does not fit the architecture, or the loss's constants are illegal.
        """
        self.config = config
        self.arch = arch
        self.topology = topology
        self.engine = engine
        policy_loss = PolicyLoss(config.algorithm, loss_config(config.algorithm, config.rollout), topology)
        self.loss: Loss = policy_loss
        self._influence = policy_loss.influence
        self._reads = read
        self.chunks = self._make_chunks()
        self.routing = PolicyRouting(self.chunks, arch, config, topology)
        self.wrapped = wrap_for_training(self.chunks, config.optimizer, topology)
        self._pipeline = Pipeline(self.wrapped, arch, config.parallel, topology)
        self.optimizer = PolicyOptimizer(self.wrapped, config.optimizer, topology)
        self.last_update: UpdateStatistics | None = None
        self._given: tuple[int, int] | None = None  # engine's version and digest of the weights that it was given last
        self.recorder: Recorder = _unrecorded
        self.records = config.rollout.save and config.rollout.save_credit
        self._record: list[torch.Tensor] | None = None  # last stage: [K, R] of each micro-batch of the last update
        self.initial_weights = self._copy_weights() if config.algorithm.kl_coefficient else None

    def _make_chunks(self) -> list[PolicyModel]:
        """Return this rank's model chunks, with their weights."""
        return load_policy(self.arch, self.config, self.topology, self._reads)

    # Training

    def prepare_for_training(self) -> None:
        """Once before the updates of a step: optimizer state on the device, model in training mode."""
        self.onload_adam_states()
        for chunk in self.wrapped:
            chunk.train()

    def finish_training(self) -> None:
        """Once after the updates of a step: advance the schedule, free the optimizer's device memory if asked to."""
        self.optimizer.finish_step()
        if self.config.optimizer.offload_state:
            self.offload_adam_states()

    def prepare_for_training_step(self) -> None:
        """Before a mini-batch: gradients to zero."""
        self.optimizer.zero_grad()

    def get_loss_and_metrics(self, batch: TrainBatch, forward_only: bool) -> tuple[float, dict[str, float]]:
        """Forward, and backward unless `forward_only`, over the mini-batch on Megatron's schedule.

        Returns the loss (one global mean over all replicas) and the metrics, the same on all ranks. Gradients are
        reduced when this returns, and are those of that loss. The device is waited for once, at the end: the norm of
        the gradients, for `finish_training_step`, comes with the metrics.
        """
        if not forward_only:
            self.routing.check(batch)
        self._record = [] if self.records and not forward_only else None
        reports = self._run(batch.micro_batches, self._loss_report, forward_only=forward_only)
        measured: Metrics = {}
        if not forward_only:
            squared = self.optimizer.squared_norm().double()
            measured[_SQUARED_NORM] = Mean(squared, torch.ones_like(squared))
        metrics: dict[str, float] = {}
        if self.topology.is_last_stage:
            for report in reports:
                measured = merge(measured, report)
            metrics = finalize(all_reduce(measured, self.topology.dp_cp))
        metrics = self._from_last_stage(metrics)
        if not forward_only:
            self._grad_norm = math.sqrt(metrics.pop(_SQUARED_NORM))
        return metrics["loss"], metrics

    def finish_training_step(self) -> None:
        """After a mini-batch's `get_loss_and_metrics`: clip and apply the gradients; the outcome is in `last_update`.

        Raises:
            GradientError: too many bad gradients in a row.
        """
        self.last_update = self.optimizer.update(self._grad_norm)

    def token_values(self, batch: TrainBatch) -> list[torch.Tensor]:
        """Return the last update's inputs and results of each token (`credit.RECORDED`); needs `records`.

        `[K, R]` float32 for each micro-batch, on every rank of the replica.
        """
        assert self._record is not None, "there was no update whose tokens were recorded"
        return self._on_every_stage(self._record, batch, len(RECORDED[self.config.algorithm.loss]))

    # Validation has nothing to prepare: the loss is the same, without gradients.

    def prepare_for_validation(self) -> None:
        for chunk in self.wrapped:
            chunk.eval()

    def finish_validation(self) -> None:
        for chunk in self.wrapped:
            chunk.train()

    def prepare_for_validation_step(self) -> None:
        pass

    def finish_validation_step(self) -> None:
        pass

    # Inference

    def prepare_for_inference(self) -> None:
        """Before generation: evaluation mode, optimizer state off the device, current weights in the engine."""
        for chunk in self.wrapped:
            chunk.eval()
        if self.config.optimizer.offload_state:
            self.offload_adam_states()
        if self.engine is not None:
            self._give_weights(self.engine)

    def finish_inference(self) -> None:
        """After generation: the engine's device memory back, if it shares the device; training mode."""
        if self.engine is not None:
            self.engine.release()
        for chunk in self.wrapped:
            chunk.train()

    def infer(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the rollout engine; arguments and result are the engine's.

        Raises:
            RuntimeError: the actor was made without an engine.
        """
        if self.engine is None:
            raise RuntimeError("this actor has no rollout engine: pass one to FIPOActor(engine=...)")
        return self.engine.generate(*args, **kwargs)

    def log_probs(self, batch: TrainBatch) -> list[torch.Tensor]:
        """Return the policy's log-probability of each response position.

        `[R]` float32 for each micro-batch, on every rank of the replica, with the packing, kernels and precision of an
        update on the same batch.
        """
        with torch.no_grad():
            outputs = self._run(batch.micro_batches, self._log_prob_report, forward_only=True)
        return [values[0] for values in self._on_every_stage(outputs, batch, kinds=1)]

    def with_old_log_probs(self, batch: TrainBatch) -> TrainBatch:
        """Return the batch with `log_probs`, and with what an update needs of the experts of that computation.

        The choice of experts counts for `routing.metrics`.

        Raises:
            ValueError: `moe.routing_replay=rollout`, and responses have no routing.
        """
        self.routing.check_sampled(batch)
        with self.routing.recording():
            log_probs = self.log_probs(batch)
        return self.routing.with_recorded(batch.with_token_values(old_log_probs=log_probs))

    def influence(self, batch: TrainBatch) -> list[torch.Tensor]:
        """Return FIPO's influence weights under the current weights, and each position's stratum of the placebo.

        `[2, R]` float32 for each micro-batch (see `PolicyLoss.influence`), on every rank of the replica: those that
        an update on the batch would use, at the cost of its forward pass.
        """
        with torch.no_grad():
            outputs = self._run(batch.micro_batches, self._influence, forward_only=True)
        return self._on_every_stage(outputs, batch, kinds=2)

    def get_inference_log_probs(
        self, response_tokens: torch.Tensor, forward_micro_batch_size: int | None = None
    ) -> torch.Tensor:
        """Log-probability of every token but the first, `[B, S] int64 -> [B, S - 1]` float32, on all ranks."""
        rows, length = response_tokens.shape
        rollouts = Rollouts.from_responses(
            ids=range(rows),
            prompts=response_tokens[:, :1].tolist(),
            responses=response_tokens[:, 1:].tolist(),
            log_probs=[[0.0] * (length - 1)] * rows,
            truncated=[False] * rows,
        )
        size = forward_micro_batch_size or max(1, self.config.trainer.tokens_per_micro_batch // length)
        bins = [range(i, min(i + size, rows)) for i in range(0, rows, size)]
        bins += [range(0)] * (-len(bins) % self.topology.micro_batch_multiple)
        batch = TrainBatch(tuple(self.pack(rollouts, list(b)) for b in bins))
        return torch.cat(self.log_probs(batch)).view(rows, length - 1)

    def get_init_policy_logprobs(self, rollout_batches: Sequence[TrainBatch]) -> list[list[torch.Tensor]]:
        """`log_probs` of each batch under the weights that training started from, and with the experts they choose.

        Raises:
            RuntimeError: they were not kept, because algorithm.kl_coefficient is 0.
        """
        if self.initial_weights is None:
            raise RuntimeError("the initial policy is kept only with algorithm.kl_coefficient > 0")
        current = self._copy_weights()
        self._put_weights(self.initial_weights)
        try:
            return [self.log_probs(batch.without_routing()) for batch in rollout_batches]
        finally:
            self._put_weights(current)

    def offload_adam_states(self) -> None:
        self.optimizer.offload_state()

    def onload_adam_states(self) -> None:
        self.optimizer.restore_state()

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        self.prepare_for_training()
        yield
        self.finish_training()

    @contextlib.contextmanager
    def training_step(self) -> Iterator[None]:
        self.prepare_for_training_step()
        yield
        self.finish_training_step()

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        self.prepare_for_inference()
        try:
            yield
        finally:
            self.finish_inference()

    def _give_weights(self, engine: Engine) -> None:
        """Give the engine the current weights, unless it has them already.

        Weights are compared by their bits, on every rank those that it holds, so that no change can be missed, whoever
        made it; and the engine says whether it still has what it was given.
        """
        current = digest(parameter for _, parameter in named_parameters(self.chunks))
        if any_rank(engine.held_version == 0 or (engine.held_version, current) != self._given):
            engine.load_weights(self.export_weights())
            self._given = engine.held_version, current

    # Shared

    def export_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the policy as Hugging Face tensors, one at a time, on every rank (see `convert.export`)."""
        return export_weights(self.chunks, self.arch, self.topology)

    def pack(self, rollouts: Rollouts, index: Sequence[int]) -> MicroBatch:
        """Pack sequences into a micro-batch for this rank, with their routing if they have any.

        Raises:
            ValueError: the routing of a response is not whole, or not this model's.
        """
        micro_batch = pack(
            rollouts,
            index,
            alignment=self.topology.sequence_alignment,
            context_size=self.topology.cp.size(),
            context_rank=self.topology.cp.rank(),
        )
        return self.routing.of_this_rank(micro_batch)

    def _run(self, micro_batches: Sequence[MicroBatch], report: Report, forward_only: bool) -> list[Any]:
        """Run the pipeline's schedule; on the last stage, what `report` said of each micro-batch's output.

        `[2, R_local]`. The loss's report is (sum, denominator, metrics), and what is returned are its metrics.
        """
        with torch.set_grad_enabled(not forward_only), self.recorder(len(micro_batches), forward_only):
            return self._pipeline.run(micro_batches, report, report == self._loss_report, forward_only)

    def _loss_report(self, output: torch.Tensor, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, Metrics]:
        return self.loss(output, micro_batch, self._record)

    def _log_prob_report(self, output: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        positions, count = micro_batch.response_index, micro_batch.num_response_positions
        return gather_tokens(output[0], positions, count, self.topology.cp)[None]

    def _on_every_stage(self, outputs: list[torch.Tensor], batch: TrainBatch, kinds: int) -> list[torch.Tensor]:
        """Return the last stage's [K, R] of each micro-batch as float32 on the host. Broadcast over the pipeline."""
        sizes = [m.num_response_positions for m in batch.micro_batches]
        flat = torch.cat(outputs, dim=1) if outputs else torch.empty(kinds, sum(sizes), device=self.topology.device)
        if self.topology.pp.size() > 1:
            dist.broadcast(flat, self.topology.last_stage_rank, group=self.topology.pp)
        return list(flat.float().cpu().split(sizes, dim=1))

    def _from_last_stage(self, metrics: dict[str, float]) -> dict[str, float]:
        """Broadcast over the pipeline group."""
        if self.topology.pp.size() == 1:
            return metrics
        return broadcast(metrics, self.topology.last_stage_rank, self.topology.pp)

    def _copy_weights(self) -> list[torch.Tensor]:
        return [p.detach().to("cpu", copy=True) for _, p in named_parameters(self.chunks)]

    @torch.no_grad()
    def _put_weights(self, weights: Sequence[torch.Tensor]) -> None:
        for (_, parameter), weight in zip(named_parameters(self.chunks), weights, strict=True):
            parameter.copy_(weight)
