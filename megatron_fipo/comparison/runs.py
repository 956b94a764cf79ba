"""Runs of a comparison: one per arm and seed, their configurations, and how far each one is.

OUT/ARM-seedN/       a run's directory
OUT/configs/I.yaml   its configuration; I counts from 1, seed by seed
OUT/spec.json        what was fixed when the first run was started
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_fipo.atomic_file import read_json, write_atomically
from megatron_fipo.comparison.spec import Endpoint, Spec
from megatron_fipo.config import Config, load_config, to_yaml
from megatron_fipo.config.setting import settings, value_of

# finished: to its last step. failed: by an error of the program, such as a policy that diverged, so that it would fail
# again. unfinished: still running, or ended by a signal or a machine, and to be continued. missing: never started.
Status = Literal["finished", "failed", "unfinished", "missing"]

# A seed fixes the base model, the order of the prompts and the seeds of all samples, so these are equal in all arms.
_SHARED = ("model.hf_path", "model.megatron_path", "model.overrides", "trainer.max_steps")
_SHARED_SECTIONS = ("data", "eval")
# Settings that a run may change when it resumes, but that decide what an endpoint measures.
_MEASURED = ("trainer.max_steps", "data.validation", "reward.accuracy_threshold")


@dataclass(frozen=True)
class PlannedRun:
    """One arm with one seed. `number`: from 1, in the order in which they run."""

    arm: str
    seed: int
    number: int
    config: Config

    @property
    def name(self) -> str:
        return self.config.run.name

    @property
    def directory(self) -> Path:
        return self.config.run_directory


@dataclass(frozen=True)
class RunState:
    """How far a run is. `cause`: of the last attempt's failure; `failures`: attempts that failed so far."""

    status: Status
    cause: str = ""
    failures: int = 0


def plan_runs(spec: Spec) -> list[PlannedRun]:
    """Return all runs, seed by seed, so that an unfinished comparison has whole pairs.

    Raises:
        ValueError: an arm's settings are illegal, differ from another's in what a seed fixes, or train too few steps
            for an endpoint.
    """
    runs: list[PlannedRun] = []
    for seed in spec.seeds:
        for arm in spec.arms:
            runs.append(PlannedRun(arm, seed, len(runs) + 1, _config(spec, arm, seed)))
        _check_shared(runs[-len(spec.arms) :])
    for endpoint in spec.endpoints:
        _check_length(endpoint, runs[0].config)
    return runs


def _config(spec: Spec, arm: str, seed: int) -> Config:
    try:
        config = load_config(spec.config, spec.overrides(arm, seed))
    except ValueError as error:
        raise ValueError(f"arm {arm}, seed {seed}: {error}") from None
    name = f"{arm}-seed{seed}"
    run = replace(config.run, name=name, directory=str(spec.out / name), seed=seed, overwrite=False)
    return replace(config, run=run)


def _check_shared(runs: Sequence[PlannedRun]) -> None:
    first = runs[0]
    for setting in settings(Config):
        if setting.name not in _SHARED and setting.name.partition(".")[0] not in _SHARED_SECTIONS:
            continue
        for run in runs[1:]:
            a, b = (value_of(r.config, setting.name) for r in (first, run))
            if a != b:
                raise ValueError(
                    f"arms {first.arm} and {run.arm} differ in {setting.name}: {a!r} and {b!r}. A seed fixes the base "
                    "model, the data and the evaluation, so set it in `settings`, or in the config"
                )


def _check_length(endpoint: Endpoint, config: Config) -> None:
    steps, every = config.trainer.max_steps, config.eval.every
    if endpoint.is_of_evaluations:
        if not config.data.benchmarks:
            raise ValueError(f"endpoint {endpoint.name} is of evaluations: set data.validation")
        have = (steps // every + bool(steps % every)) if every else 1
        unit, change = "evaluations after training began", "lower eval.every, raise trainer.max_steps"
    else:
        have, unit, change = steps, "training steps", "raise trainer.max_steps"
    if have < endpoint.last:
        raise ValueError(
            f"endpoint {endpoint.name} is the mean of the last {endpoint.last} values of {endpoint.metric}, but a run "
            f"has {have} {unit}: {change}, or lower endpoints.{endpoint.name}.last"
        )


def check_saved(spec: Spec, runs: Sequence[PlannedRun]) -> tuple[int, ...]:
    """Check that what was run so far belongs to this specification; return the seeds that were added since.

    Raises:
        ValueError: arms, pairs, endpoints or settings have changed, seeds were removed, or a run's directory holds a
            run with other settings.
    """
    added: tuple[int, ...] = ()
    path = spec.out / "spec.json"
    if path.exists():
        saved = read_json(path)
        if changed := _changed(saved.get("fixed"), spec.fixed()):
            raise ValueError(
                f"{spec.out} holds a comparison with other {', '.join(changed)}. What is compared is fixed before the "
                "first run: restore it (see spec.json there), or choose another `out`"
            )
        first = saved.get("seeds") or []
        if removed := sorted(set(first) - set(spec.seeds)):
            raise ValueError(
                f"seeds {', '.join(map(str, removed))} are part of the comparison in {spec.out}: seeds may be added, "
                "but not removed"
            )
        added = tuple(seed for seed in spec.seeds if seed not in first)
    if different := [text for run in runs if (text := _different(run))]:
        listed = "\n".join(f"  - {text}" for text in different[:10])
        raise ValueError(
            f"runs in {spec.out} were made with other settings:\n{listed}\n"
            "Restore them in the specification or its config, or choose another `out`"
        )
    return added


def _changed(saved: Any, now: dict[str, Any]) -> list[str]:
    old = saved if isinstance(saved, dict) else {}
    return [name for name in now if old.get(name) != now[name]]


def _different(run: PlannedRun) -> str | None:
    """Return which settings of a run that was started differ from the planned ones; None if none does."""
    from megatron_fipo.resume import changes

    path = run.directory / "config.yaml"
    if not path.is_file():
        return None
    found = changes(path, run.config)
    saved = load_config(path)
    for setting in settings(Config):
        free = setting.facts.resume == "free"
        if free and (setting.name in _MEASURED or setting.name.startswith("eval.")):
            old, new = (value_of(config, setting.name) for config in (saved, run.config))
            if old != new:
                found.append(f"{setting.name}: {old} -> {new}")
    return f"{run.name}: {'; '.join(found)}" if found else None


def save_plan(spec: Spec, runs: Sequence[PlannedRun]) -> None:
    """Write the runs' configurations, and before the first run what is fixed."""
    folder = spec.out / "configs"
    folder.mkdir(parents=True, exist_ok=True)
    path = spec.out / "spec.json"
    if not path.exists():
        write_atomically(path, json.dumps({"fixed": spec.fixed(), "seeds": list(spec.seeds)}, indent=2) + "\n")
    for run in runs:
        write_atomically(config_path(spec, run), to_yaml(run.config))


def config_path(spec: Spec, run: PlannedRun) -> Path:
    """Return the path of a run's configuration."""
    return spec.out / "configs" / f"{run.number}.yaml"


def state_of(run: PlannedRun) -> RunState:
    """Return how far a run is, from what it left in its directory.

    Raises:
        ValueError: its summary cannot be read.
    """
    from megatron_fipo.launch import attempts

    records = attempts.read(run.directory / "attempts.jsonl")
    failed = [r for r in records if r.event == "failed" and r.kind == "program"]
    summary = run.directory / "summary.json"
    if summary.is_file() and read_json(summary).get("steps") == run.config.trainer.max_steps:
        return RunState("finished", failures=len(failed))
    if not records:
        return RunState("missing")
    last = records[-1]
    status: Status = "failed" if last in failed else "unfinished"
    cause = (last.cause.strip().splitlines() or [""])[0] if last.event == "failed" else ""
    return RunState(status, cause, len(failed))
