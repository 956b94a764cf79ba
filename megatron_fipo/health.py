"""Rules over a run's metrics, step by step, that detect problems and explain them.

Training prints a finding once, when its rule begins to hold; the report lists all of them. A rule's `source` says where
it comes from: "paper" (arXiv 2603.19835), "code" (the authors' implementation), or "choice", ours. Thresholds are ours
in any case, chosen so that the quickstart's recorded runs are silent, and not fitted on large runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Literal

Row = Mapping[str, float]

MISMATCH_RULE = "The engine drifts from the trainer"
_QUIET = 10  # steps without the rule after which it is a new finding
_BASELINE = 20  # steps that define the usual values


@dataclass(frozen=True)
class Limits:
    """Limits from a run's configuration that the rules use, in tokens."""

    max_response_tokens: int
    overlong_buffer_tokens: int


@dataclass(frozen=True)
class Rule:
    """Attributes: holds: of all rows up to the newest, what was seen in the run if the rule holds there, else None."""

    name: str
    reason: str
    source: Literal["paper", "code", "choice"]
    holds: Callable[[Sequence[Row], Limits], str | None]


@dataclass(frozen=True)
class Finding:
    """A rule that holds from the step `first` to the step `last`; `seen` is what it saw at first."""

    rule: Rule
    first: int
    last: int
    seen: str

    @property
    def text(self) -> str:
        return f"{self.rule.name}: {self.seen}. {self.rule.reason}"


class Watch:
    """Takes the rows of a run in the order of their steps.

    Attributes:
        findings: all so far, in the order in which they began.
        holding: names of the rules that hold at the newest step.
    """

    def __init__(self, limits: Limits) -> None:
        self.findings: list[Finding] = []
        self.holding: set[str] = set()
        self._limits = limits
        self._rows: list[Row] = []
        self._latest: dict[str, int] = {}  # rule -> index of its latest finding

    def update(self, row: Mapping[str, float | None]) -> list[Finding]:
        """Return the findings that begin with this step; any metric may be missing or None."""
        step = int(row["step"] or 0)
        watched = {n: v for n in _WATCHED if (v := row.get(n)) is not None and v == v}
        self._rows.append(watched)
        begun = []
        self.holding = set()
        for rule in RULES:
            seen = rule.holds(self._rows, self._limits)
            if seen is None:
                continue
            self.holding.add(rule.name)
            index = self._latest.get(rule.name)
            if index is not None and step - self.findings[index].last <= _QUIET:
                self.findings[index] = replace(self.findings[index], last=step)
                continue
            self._latest[rule.name] = len(self.findings)
            self.findings.append(Finding(rule, step, step, seen))
            begun.append(self.findings[-1])
        return begun


def findings(rows: Sequence[Mapping[str, float | None]], limits: Limits) -> list[Finding]:
    """All findings of a history, in the order in which they began."""
    watch = Watch(limits)
    for row in rows:
        watch.update(row)
    return watch.findings


_NO_OP_STEPS = 5  # a single step may have so few informative groups that they are one mini-batch


def _no_op(rows: Sequence[Row], limits: Limits) -> str | None:
    recent = rows[-_NO_OP_STEPS:]
    if len(recent) < _NO_OP_STEPS or not all(_is_no_op(row) for row in recent):
        return None
    return f"every influence weight of the last {_NO_OP_STEPS} steps is exactly 1 ({_updates(recent)} updates a step)"


def _is_no_op(row: Row) -> bool:
    """Not where the learning rate is 0, as in the first step of the warm-up: nothing can move there."""
    weights = row.get("policy/influence_weight_min") == row.get("policy/influence_weight_max") == 1
    shifts = row.get("policy/future_kl_min") == row.get("policy/future_kl_max") == 0
    return (weights or shifts) and row.get("policy/lr", 1.0) > 0


def _updates(rows: Sequence[Row]) -> str:
    return f"{fmean(row.get('policy/updates', 1.0) for row in rows):.3g}"


_COLLAPSE_STEPS = 5  # between the first spike and the jump


def _collapse(rows: Sequence[Row], limits: Limits) -> str | None:
    before, recent = rows[-_BASELINE - _COLLAPSE_STEPS : -_COLLAPSE_STEPS], rows[-_COLLAPSE_STEPS:]
    if len(before) < _COLLAPSE_STEPS:
        return None
    usual_clip, usual_kl = _usual(before, "policy/dual_clip_fraction"), _usual(before, "policy/approx_kl")
    spikes = [n for n, r in enumerate(recent) if r.get("policy/dual_clip_fraction", 0.0) > max(10 * usual_clip, 1e-4)]
    jump = abs(rows[-1].get("policy/approx_kl", 0.0))
    if not spikes or jump <= max(10 * usual_kl, 1e-3):
        return None
    clip = recent[spikes[0]]["policy/dual_clip_fraction"]
    return f"dual-clip fraction {clip:.2g} (usually {usual_clip:.2g}), then policy KL {jump:.2g} ({usual_kl:.2g})"


def _usual(rows: Sequence[Row], name: str) -> float:
    values = [abs(row[name]) for row in rows if name in row]
    return median(values) if values else 0.0


def _entropy(rows: Sequence[Row], limits: Limits) -> str | None:
    first, last = _mean(rows[:5], "policy/entropy"), _mean(rows[-5:], "policy/entropy")
    accuracy = _mean(rows[-5:], "generated/accuracy")
    if len(rows) < 10 or first is None or last is None or accuracy is None:
        return None
    if last >= 0.05 * first or accuracy >= 0.9:  # low entropy is expected once the task is solved
        return None
    return f"entropy {last:.2g}, {last / first:.1%} of the first steps', at accuracy {accuracy:.2f}"


def _stagnation(rows: Sequence[Row], limits: Limits) -> str | None:
    if len(rows) < _BASELINE:
        return None
    recent = rows[-_BASELINE:]
    q75, limit = _mean(recent, "batch/response_length/q75"), limits.max_response_tokens - limits.overlong_buffer_tokens
    older = _mean(recent[: _BASELINE // 2], "batch/response_length/mean")
    newer = _mean(recent[_BASELINE // 2 :], "batch/response_length/mean")
    if q75 is None or older is None or newer is None or q75 < limit or newer > 1.02 * older:
        return None
    return f"a quarter of the training batch is longer than {limit} tokens, and its mean stays at {newer:.0f}"


def _all_equal(rows: Sequence[Row], limits: Limits) -> str | None:
    recent = rows[-5:]
    generated = sum(row.get("sampling/prompts_generated", 0.0) for row in recent)
    equal = sum(row.get("sampling/all_correct", 0.0) + row.get("sampling/all_incorrect", 0.0) for row in recent)
    if len(recent) < 5 or not generated or equal < 0.9 * generated:
        return None
    correct = sum(row.get("sampling/all_correct", 0.0) for row in recent)
    return f"{equal / generated:.0%} of the groups are all correct ({correct / generated:.0%}) or all incorrect"


def _mismatch(rows: Sequence[Row], limits: Limits) -> str | None:
    if len(rows) < _BASELINE + 5:
        return None
    first = _usual(rows[:_BASELINE], "mismatch/abs_mean")
    last = _usual(rows[-5:], "mismatch/abs_mean")
    if last <= max(3 * first, 1e-3):
        return None
    return f"mean |trainer - engine| is {last:.2g} nats a token, {first:.2g} in the first {_BASELINE} steps"


def _at_bound(rows: Sequence[Row], limits: Limits) -> str | None:
    shares = [_later_share(row) for row in rows[-5:]]
    if len(shares) < 5 or min(shares) < 0.5:
        return None
    return f"{fmean(shares):.0%} of the tokens have the largest influence weight, in updates after a step's first"


def _later_share(row: Row) -> float:
    """Share of tokens at the upper bound without a step's first update, whose weights are all 1; 0 where unknown."""
    share, updates = row.get("policy/influence_clip_fraction_upper", 0.0), row.get("policy/updates", 1.0)
    moves = row.get("policy/influence_weight_max", 0.0) > 1
    return share * updates / (updates - 1) if updates > 1 and moves else 0.0


def _idle_experts(rows: Sequence[Row], limits: Limits) -> str | None:
    first, last = _mean(rows[:5], "moe/idle_experts"), _mean(rows[-5:], "moe/idle_experts")
    if len(rows) < 10 or first is None or last is None or last < max(0.5, 2 * first):
        return None
    return f"no token goes to {last:.0%} of the experts, {first:.0%} in the first steps"


def _undecided(rows: Sequence[Row], limits: Limits) -> str | None:
    late, failed = (rows[-1].get(f"generated/verifier_{name}", 0.0) for name in ("timeouts", "errors"))
    if not late + failed:
        return None
    return f"{late:.0f} answers ran into the time limit, {failed:.0f} into the memory limit or an error"


def _mean(rows: Sequence[Row], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return fmean(values) if values else None


RULES = (
    Rule(
        "FIPO does nothing",
        "Old log-probabilities are those of the step's start, so Future-KL is 0 until the first update: "
        "with one update a step this is DAPO. Lower trainer.mini_batch_prompts or raise trainer.epochs_per_batch.",
        "code",
        _no_op,
    ),
    Rule(
        "Collapse begins",
        "A spike of the low-clip fraction (the dual clip's), then a jump of the KL, is how the paper's unmasked "
        "run broke down (Figure 2). Go back to a checkpoint before it, and lower the learning rate or "
        "algorithm.safety_threshold. (5 steps, tenfold of the 20 steps before: our choice.)",
        "paper",
        _collapse,
    ),
    Rule(
        "Entropy collapsed",
        "A policy without entropy generates equal responses, and groups of equal responses have no advantage. "
        "(Below 5% of the first steps' and an accuracy below 0.9: our choice.)",
        "choice",
        _entropy,
    ),
    Rule(
        "Length stands at the limit",
        "These responses are penalized for their length, so that it cannot grow further, which is what FIPO is for: "
        "raise rollout.max_response_tokens. (20 steps, 2% growth: our choice.)",
        "paper",
        _stagnation,
    ),
    Rule(
        "Few groups are informative",
        "Groups whose responses are all correct or all incorrect have no advantage and are dropped; the recipe "
        "generates for four times the prompts of a step, enough for 75%. The problems are too easy or too hard by now. "
        "(90% over 5 steps: our choice.)",
        "code",
        _all_equal,
    ),
    Rule(
        MISMATCH_RULE,
        "Log-probabilities of the same weights should differ by rounding only; Future-KL adds such noise up over "
        "some half-lives. Stale weights, or precision. (Threefold and 0.001 nats: our choice.)",
        "choice",
        _mismatch,
    ),
    Rule(
        "The routers collapse",
        "They send all tokens to few experts, and the others no longer learn. Go back to a checkpoint before it, and "
        "set moe.routing_replay=update. (Half of the experts, and twice as many as in the first steps: our choice.)",
        "choice",
        _idle_experts,
    ),
    Rule(
        "The verifier could not decide",
        "Such answers count as incorrect. The rows of rollouts/*.parquet whose failure is set have them: a slow "
        "answer needs a larger reward.timeout_seconds, many need more reward.workers or reward.batch_seconds; an error "
        "can be a ground truth that is not mathematics. (Any in a step: our choice.)",
        "choice",
        _undecided,
    ),
    Rule(
        "Influence weights are at their bound",
        "Weights that are all at algorithm.influence_clip's upper bound no longer distinguish tokens: they act like a "
        "larger learning rate. A shorter half-life or fewer updates a step keep Future-KL smaller. "
        "(Half of the tokens in 5 steps: our choice.)",
        "choice",
        _at_bound,
    ),
)

_WATCHED = (
    *("policy/influence_weight_min", "policy/influence_weight_max", "policy/future_kl_min", "policy/future_kl_max"),
    *("policy/lr", "policy/updates", "policy/dual_clip_fraction", "policy/approx_kl", "policy/entropy"),
    *("policy/influence_clip_fraction_upper", "batch/response_length/q75", "batch/response_length/mean"),
    *("sampling/prompts_generated", "sampling/all_correct", "sampling/all_incorrect"),
    *("mismatch/abs_mean", "generated/accuracy", "generated/verifier_timeouts", "generated/verifier_errors"),
    "moe/idle_experts",
)
