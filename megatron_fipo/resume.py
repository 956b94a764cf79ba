"""Rules of resuming: what an earlier attempt left in a run's directory, and which settings may differ from it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config, load_config
from megatron_fipo.evaluation import Evaluation
from megatron_fipo.former_names import current_metrics
from megatron_fipo.run_log import leftovers

# What may change between two attempts of a run: the layout and the machine, what is kept and shown, how long it goes
# on. Everything else decides what is learned. A name ending in "." stands for its whole section.
_FREE = (
    *("parallel.", "checkpoint.", "resume.", "profile.", "eval.", "run.name", "run.directory", "run.overwrite"),
    *("run.deterministic", "model.recompute", "model.transformer_engine", "model.lm_head_chunk_tokens"),
    *("data.validation", "data.validation."),  # one file, or several with names
    *("rollout.engine", "rollout.batch_size", "rollout.save", "rollout.save_credit"),
    *("rollout.mismatch_warning", "rollout.settle_seconds"),
    *("rollout.placement", "rollout.num_servers", "rollout.tensor_parallel", "rollout.nodes", "rollout.gpus_per_node"),
    *("rollout.servers", "rollout.vllm_python", "rollout.weight_transport", "rollout.weight_bucket_mb"),
    *("rollout.weight_directory", "rollout.verify_weights", "rollout.deadline_seconds", "rollout.start_seconds"),
    *("rollout.max_concurrency", "rollout.kv_cache_gb", "rollout.gpu_memory_utilization", "rollout.prefix_cache"),
    *("reward.accuracy_threshold", "reward.workers", "reward.timeout_seconds", "reward.batch_seconds"),
    *("optimizer.distributed", "optimizer.offload_state"),
    *("trainer.max_steps", "trainer.tokens_per_micro_batch", "trainer.micro_batch_order"),
    *("trainer.strict", "trainer.export_policy", "trainer.tensorboard", "trainer.wandb_project"),
)


@dataclass(frozen=True)
class Progress:
    """How far a run has come; saved with every checkpoint.

    Attributes:
        step: finished steps.
        before, after: the first and the newest evaluation.
        best: the highest validation avg@k so far.
        unlogged: metrics of `step` whose evaluation and record are still missing.
        seconds: wall seconds over all attempts.
    """

    step: int = 0
    before: Evaluation | None = None
    after: Evaluation | None = None
    best: float | None = None
    unlogged: dict[str, float] | None = None
    seconds: float = 0.0

    def evaluated(self, result: Evaluation | None) -> Progress:
        """Return the progress with one more evaluation."""
        if result is None:
            return self
        best = result.avg if self.best is None else max(self.best, result.avg)
        return replace(self, before=self.before or result, after=result, best=best)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_state_dict(state: dict[str, Any]) -> Progress:
        evaluations = {name: state[name] and Evaluation.from_state_dict(state[name]) for name in ("before", "after")}
        unlogged = state.get("unlogged") and current_metrics(state["unlogged"])
        return Progress(**{**state, **evaluations, "unlogged": unlogged})


def starts_over(config: Config) -> bool:
    """Return whether what an earlier run left is to be removed.

    A job that Slurm has requeued comes with the arguments of its first start; that start's
    `run.overwrite=true` was not meant for the job's own checkpoints.
    """
    return config.run.overwrite and int(os.environ.get("SLURM_RESTART_COUNT", "0")) == 0


def replaces_weights(config: Config) -> bool:
    """Return whether a checkpoint of the run replaces the initial weights, so that they need not be read.

    The KL penalty needs them in any case.
    """
    there = any((config.run_directory / "checkpoints").glob("step_*"))
    return there and not starts_over(config) and not config.algorithm.kl_coefficient


def check_directory(config: Config) -> None:
    """Check that a run may start, or resume, in its directory, before any rank starts.

    Raises:
        ValueError: the directory holds a run that this one would silently alter, or a finished one without
            checkpoints, is no directory, or is to be replaced and holds what no run has left.
    """
    directory = config.run_directory
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"run.directory {directory} is a file; choose another run.name or run.directory")
    if starts_over(config):
        _check_own(directory)
        return
    if not (directory / "metrics.jsonl").exists():
        return
    if (directory / "summary.json").exists() and not (directory / "checkpoints").exists():
        raise ValueError(
            f"{directory} holds a finished run without checkpoints: choose another run.name, or set run.overwrite=true "
            "to replace it"
        )
    found = changes(directory / "config.yaml", config)
    if found and not config.resume.allow_changes:
        listed = "\n".join(f"  - {change}" for change in found)
        raise ValueError(
            f"{directory} holds a run with other settings, which would silently become another run:\n{listed}\n"
            "Go back to them, choose another run.name, set run.overwrite=true to start over, or "
            "resume.allow_changes=true to go on all the same"
        )


def _check_own(directory: Path) -> None:
    """Check that what `run_log.clear` would remove was left by a run."""
    found = [path.name for path in leftovers(directory)]
    began, metrics = directory / "began.json", directory / "metrics.jsonl"
    if found and not began.is_file() and not (metrics.is_file() and (directory / "config.yaml").is_file()):
        raise ValueError(
            f"run.overwrite=true would remove {', '.join(found[:5])} in {directory}, which no run has left there (it "
            "has no began.json): choose another run.name or run.directory, or remove them yourself"
        )


def changes(saved: Path, config: Config) -> list[str]:
    """Return the settings that decide what is learned and differ from a saved configuration, as `name: old -> new`.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        old = _flat(asdict(load_config(saved)))
    except ValueError as error:
        raise ValueError(f"cannot tell what the run in {saved.parent} was: {error}") from None
    new = _flat(asdict(config))
    return [
        f"{name}: {old.get(name)} -> {new.get(name)}"
        for name in sorted(old.keys() | new.keys())
        if not _is_free(name) and old.get(name) != new.get(name)
    ]


def _is_free(name: str) -> bool:
    return any(name.startswith(free) if free.endswith(".") else name == free for free in _FREE)


def _flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in node.items():
        flat.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat
