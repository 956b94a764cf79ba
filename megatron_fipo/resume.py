"""Rules of resuming: what an earlier attempt left in a run's directory, and which settings may differ from it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config, load_config
from megatron_fipo.config.setting import settings, value_of
from megatron_fipo.evaluation import Evaluation
from megatron_fipo.former_names import current_metrics
from megatron_fipo.run_log import leftovers


@dataclass(frozen=True)
class Progress:
    """How far a run has come; saved with every checkpoint.

    Attributes:
        step: finished steps.
        before, after: the first and the newest evaluation.
        best: the highest validation avg@k so far, of `checkpoint.best_on` if that is set.
        unlogged: metrics of `step` whose evaluation and record are still missing.
        seconds: wall seconds over all attempts.
    """

    step: int = 0
    before: Evaluation | None = None
    after: Evaluation | None = None
    best: float | None = None
    unlogged: dict[str, float] | None = None
    seconds: float = 0.0

    def evaluated(self, result: Evaluation | None, best_on: str | None = None) -> Progress:
        """Return the progress with one more evaluation; `best_on`: see `checkpoint.best_on`."""
        if result is None:
            return self
        score = (result if best_on is None else result.benchmarks[best_on]).avg
        best = score if self.best is None else max(self.best, score)
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
            f"{directory} holds a run with other settings:\n{listed}\n"
            "Restore them, choose another run.name, set run.overwrite=true to start over, or set "
            "resume.allow_changes=true to resume with the new ones"
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
        old = load_config(saved)
    except ValueError as error:
        raise ValueError(f"cannot read the settings of the run in {saved.parent}: {error}") from None
    return differences(old, config)


def differences(old: Any, new: Any) -> list[str]:
    """Return the settings with resume rule "fixed" that differ between two configurations, as `name: old -> new`."""
    found = []
    for setting in settings(type(new)):
        if setting.facts.resume == "fixed":
            before, after = (_flat(value_of(config, setting.name), setting.name) for config in (old, new))
            found += [
                f"{name}: {before.get(name)} -> {after.get(name)}"
                for name in sorted(before.keys() | after.keys())
                if before.get(name) != after.get(name)
            ]
    return found


def _flat(value: Any, name: str) -> dict[str, Any]:
    """Return a value by its name, and each value of a mapping by a dotted name."""
    if not isinstance(value, dict):
        return {name: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}").items()}
