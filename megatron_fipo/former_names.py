"""Names of earlier releases in files that are still read: metrics, evaluations, interrupted conversions.

Readers replace them by the current names, so that an old run is resumed, reported and compared like a new one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")

_LENGTHS = ("mean", "min", "q25", "median", "q75", "max", "correct", "incorrect")
# Metrics in metrics.jsonl and in checkpoints.
METRICS = {
    "sampling/groups_all_right": "sampling/all_correct",
    "sampling/groups_all_wrong": "sampling/all_incorrect",
    "reward/mean": "generated/reward",
    "reward/accuracy": "generated/accuracy",
    "reward/verifier_timeouts": "generated/verifier_timeouts",
    "reward/verifier_errors": "generated/verifier_errors",
    **{f"response_length/{name}": f"generated/response_length/{name}" for name in _LENGTHS},
    "response_length/right": "generated/response_length/correct",
    "response_length/wrong": "generated/response_length/incorrect",
    "response_length/truncated": "generated/truncated",
    "batch/response_length": "batch/response_length/mean",
    "policy/policy_kl": "policy/approx_kl",
    "mismatch/rollout_mismatch_abs": "mismatch/abs_mean",
    "mismatch/rollout_mismatch_abs_max": "mismatch/abs_max",
    "mismatch/rollout_mismatch_k1": "mismatch/k1",
    "mismatch/rollout_mismatch_k3": "mismatch/k3",
    "mismatch/rollout_mismatch_outside_fraction": "mismatch/outside_fraction",
    "mismatch/rollout_mismatch_ratio_p999": "mismatch/ratio_p999",
}
# Lengths in an evaluation's summary, and behind `eval/length/` and `eval/{benchmark}/length/` in metrics.jsonl.
LENGTHS = {
    "right": "correct",
    "right_median": "correct_median",
    "wrong": "incorrect",
    "wrong_median": "incorrect_median",
}
FIGURES = ("policy_kl", "right_and_wrong")  # names of a report's figures without .png; they are written no more
SAMPLES = "drawn"  # subdirectory of an evaluation's finished samples
# Keys of an evaluation's settings.json. The problems of each benchmark have a key that ends in its name.
EVALUATION_SETTINGS = {"the evaluation's beginning": "start_time", "the weights": "weights_fingerprint"}
_VOTE, _ANSWERED = "cons@k", "cons_answered@k"
_PROBLEMS = re.compile(r"the problems of (.+)", re.DOTALL)


def current_metrics(row: Mapping[str, Value]) -> dict[str, Value]:
    """Return a row of metrics by their current names.

    Without `cons_answered@k`, `cons@k` is of an earlier release, in which a response without an answer did not vote.
    """
    names = {name: _metric(name) for name in row}
    if not any(_ANSWERED in name for name in names):
        names = {name: re.sub(rf"/{_VOTE}(?=/|$)", f"/{_ANSWERED}", new) for name, new in names.items()}
    return {names[name]: value for name, value in row.items()}


def current_evaluation(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an `Evaluation`. What an earlier release held as `cons` is `cons_answered`."""
    if "cons_answered" in state or "cons" not in state:
        return dict(state)
    intervals = {(_ANSWERED if name == _VOTE else name): ends for name, ends in state.get("intervals", {}).items()}
    return {**state, "cons": None, "cons_answered": state["cons"], "intervals": intervals}


def current_lengths(lengths: Mapping[str, Value]) -> dict[str, Value]:
    """Return an evaluation's lengths by their current names."""
    return {LENGTHS.get(name, name): value for name, value in lengths.items()}


def current_evaluation_settings(settings: Mapping[str, Value]) -> dict[str, Value]:
    """Return the content of an evaluation's settings.json by its current keys."""
    return {_setting(name): value for name, value in settings.items()}


def staging_directory(out: Path) -> Path:
    """Return where an earlier release kept an interrupted conversion to `out`."""
    return out.with_name(f".{out.name}.unfinished")


def _metric(name: str) -> str:
    group, _, last = name.rpartition("/")
    if name.startswith("eval/") and group.endswith("/length"):
        return f"{group}/{LENGTHS.get(last, last)}"
    return METRICS.get(name, name)


def _setting(name: str) -> str:
    problems = _PROBLEMS.fullmatch(name)
    return problems_setting(problems[1]) if problems else EVALUATION_SETTINGS.get(name, name)


def problems_setting(benchmark: str) -> str:
    """Return the key of a benchmark's problems in settings.json."""
    return f"problems_fingerprint.{benchmark}"
