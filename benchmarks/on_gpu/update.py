"""One update of the policy: FIPO relative to language modelling and to Megatron's own step.

Also measures old log-probabilities, offloading and a checkpoint.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_fipo import launch
from megatron_fipo.batch import TrainBatch
from megatron_fipo.checkpoint import Checkpointer
from megatron_fipo.config import CheckpointConfig, Config, ParallelConfig
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.profiling.utilization import Utilization
from megatron_fipo.scaling.measure.actor import LanguageModelLoss, MeasuredActor, make_batch
from on_gpu.settings import Settings, free, transformer_engine_choices
from train_step import baseline_step, timed


def updates(settings: Settings) -> dict[str, Any]:
    """Measure with torch's layers and, if available, with Transformer Engine's, named `te_off_*` and `te_on_*`.

    The last of these, as a run would use it, also gives `update_seconds`, offloading and a checkpoint.
    """
    figures: dict[str, Any] = {}
    choices = transformer_engine_choices(settings.device)
    for choice in choices:
        config = settings.config(choice)
        topology = topologies.initialize(config.parallel, config.run.seed)
        try:
            around: dict[str, Any] | None = {} if choice == choices[-1] else None
            found = _guarded(lambda config=config, topology=topology, a=around: _policy(settings, config, topology, a))
            if around and "update_seconds" in found:
                figures |= around | {"update_seconds": found["update_seconds"]}
            free()
            found |= _guarded(lambda config=config, topology=topology: _megatron(settings, config, topology))
        finally:
            topologies.destroy()
            free()
        if {"fipo_seconds", "cross_entropy_seconds"} <= found.keys():
            found["fipo_over_cross_entropy"] = found["fipo_seconds"] / found["cross_entropy_seconds"]
        figures |= {f"te_{choice}_{name}": value for name, value in found.items()}
    return figures


def deterministic(settings: Settings) -> dict[str, Any]:
    """Measure the seconds of an update with run.deterministic, and whether two of them gave the same bits.

    Runs in a separate rank, since CUDA reads the environment at its start.
    """
    out = settings.directory / "deterministic.json"
    launch.run(_repeated, ParallelConfig(), (settings, str(out)), deterministic=True)
    return {f"update_deterministic_{name}": value for name, value in json.loads(out.read_text()).items()}


def _guarded(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Report a part that does not fit the GPU instead of failing; the others are still measured."""
    try:
        return measure()
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": str(error).splitlines()[0]}


def _policy(settings: Settings, config: Config, topology: Topology, around: dict[str, Any] | None) -> dict[str, Any]:
    """Measure one kind of layers, and add the measurements around an update to `around` unless it is None."""
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    actor = MeasuredActor(settings.measurement(config), topology)
    batch = make_batch(settings.measurement(config), actor)
    sequences = settings.update()
    fipo_loss, lm_loss = actor.loss, LanguageModelLoss(topology)
    seen: dict[str, float] = {}

    def passes() -> None:
        actor.prepare_for_training_step()
        seen.update(actor.get_loss_and_metrics(batch, forward_only=False)[1])

    def lm_passes() -> None:
        actor.loss = lm_loss
        try:
            actor.prepare_for_training_step()
            actor.get_loss_and_metrics(batch, forward_only=False)
        finally:
            actor.loss = fipo_loss

    passes()
    first = seen["log_ratio_abs_max"]  # same weights as for the old log-probabilities
    lm_passes()
    pairs = [(timed(passes), timed(lm_passes)) for _ in range(settings.steps)]
    with actor.training():
        seconds = statistics.median(timed(lambda: _update(actor, batch)) for _ in range(settings.steps))
    log_probs = statistics.median(timed(lambda: actor.log_probs(batch)) for _ in range(settings.steps))
    rates = Utilization(config, actor.arch, topology)(sequences.lengths, seconds)
    peak = torch.cuda.max_memory_allocated() / 1e9 if settings.device == "cuda" else None
    if around is not None:
        around |= {"update_same_bits": _repeats(actor, batch)} | _offload(actor) | _checkpoint(settings, actor, batch)
    return {
        "tokens": sequences.tokens,
        "micro_batches": len(batch.micro_batches),
        "update_seconds": seconds,
        "update_tflops": rates["throughput/update_tflops_per_rank"],
        "mfu": rates.get("throughput/mfu"),
        "fipo_seconds": statistics.median(f for f, _ in pairs),
        "lm_seconds": statistics.median(lm for _, lm in pairs),
        "fipo_over_lm": statistics.median(f / lm for f, lm in pairs),
        "log_probs_seconds": log_probs,
        "first_log_ratio_abs_max": first,
        "peak_gb": peak,
    }


def _update(actor: MeasuredActor, batch: TrainBatch) -> None:
    with actor.training_step():
        actor.get_loss_and_metrics(batch, forward_only=False)


def _offload(actor: MeasuredActor) -> dict[str, Any]:
    """Time moving Adam's state to host memory and back."""
    states = actor.optimizer.parameter_states()
    size = sum(t.nbytes for s in states for t in (s.main, *s.moments.values()))
    away, back = timed(actor.offload_adam_states), timed(actor.onload_adam_states)
    return {"offload_gb": size / 1e9, "offload_seconds": away, "offload_back_seconds": back}


def _checkpoint(settings: Settings, actor: MeasuredActor, batch: TrainBatch) -> dict[str, Any]:
    """Time the pauses of two asynchronous saves: the first one pins memory."""
    directory = settings.directory / "checkpoints"
    checkpointer = Checkpointer(
        directory, CheckpointConfig(keep_last=1, keep_best=False), actor, actor.topology, warn=_refuse
    )
    pauses = []
    try:
        for step in (1, 2):
            pauses.append(timed(lambda step=step: checkpointer.save(step, {})))
            with actor.training():
                _update(actor, batch)
            checkpointer.finish()
        assert checkpointer.last is not None
        return {
            "checkpoint_gb": checkpointer.last.bytes / 1e9,
            "checkpoint_first_pause_seconds": pauses[0],
            "checkpoint_pause_seconds": pauses[1],
            "checkpoint_writing_seconds": checkpointer.last.writing,
        }
    finally:
        checkpointer.close()
        shutil.rmtree(directory, ignore_errors=True)


def _refuse(text: str) -> None:
    raise RuntimeError(text)


def _megatron(settings: Settings, config: Config, topology: Topology) -> dict[str, Any]:
    """Time GPTModel with Megatron's head and vocabulary-parallel cross-entropy over the same micro-batches."""
    measurement = replace(settings.measurement(config), loss="lm")
    actor: Any = _PackingOnly(config, topology)
    batch = make_batch(measurement, actor)
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = baseline_step(actor.arch, config, topology, batch)
    step()
    found = {"cross_entropy_seconds": statistics.median(timed(step) for _ in range(settings.steps))}
    peak = torch.cuda.max_memory_allocated() / 1e9 if settings.device == "cuda" else None
    return {**found, "cross_entropy_peak_gb": peak}


class _PackingOnly:
    """Replacement for an actor that packs batches and has no model."""

    def __init__(self, config: Config, topology: Topology) -> None:
        from megatron_fipo.actor.routing import PolicyRouting
        from megatron_fipo.model.check import check_model

        self.config, self.topology, self.arch = config, topology, check_model(config)
        self.routing = PolicyRouting([], self.arch, config, topology)

    pack = MeasuredActor.pack


def _repeated(settings: Settings, out: str) -> None:
    """Run in a rank: time updates, and compare the gradients of the same mini-batch computed twice."""
    config = settings.config(transformer_engine_choices(settings.device)[-1], deterministic=True)
    topology = topologies.initialize(config.parallel, config.run.seed)
    actor = MeasuredActor(settings.measurement(config), topology)
    batch = make_batch(settings.measurement(config), actor)
    same = _repeats(actor, batch)
    with actor.training():
        _update(actor, batch)
        seconds = [timed(lambda: _update(actor, batch)) for _ in range(settings.steps)]
    topologies.destroy()
    Path(out).write_text(json.dumps({"seconds": statistics.median(seconds), "same_bits": same}))


def _repeats(actor: MeasuredActor, batch: TrainBatch) -> bool:
    """Return whether the gradients of the same mini-batch are bitwise equal twice."""
    first, second = (_gradients(actor, batch) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _gradients(actor: MeasuredActor, batch: TrainBatch) -> list[torch.Tensor]:
    actor.prepare_for_training_step()
    actor.get_loss_and_metrics(batch, forward_only=False)
    return [p.main_grad.detach().cpu() for chunk in actor.chunks for p in chunk.parameters()]
