"""Each rule on a history that shows its fault and nothing else, and none on a healthy one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_fipo.config import Config, RolloutConfig, RunConfig
from megatron_fipo.health import RULES, Limits, Watch, findings
from megatron_fipo.run_log import RunLog

LIMITS = Limits(max_response_tokens=1000, overlong_buffer_tokens=200)
Row = dict[str, float]


def healthy(steps: int = 60) -> list[Row]:
    """A run that learns as the quickstart does: accuracy and length rise, entropy falls to a seventh."""
    return [
        {
            "step": step,
            "policy/lr": 0.0 if step == 1 else 1e-6,  # the first step of a warm-up
            "policy/updates": 4.0,
            "policy/influence_weight_min": 1.0,
            "policy/influence_weight_max": 1.0 if step == 1 else 1.2,
            "policy/future_kl_min": 0.0 if step == 1 else -0.3,
            "policy/future_kl_max": 0.0 if step == 1 else 0.4,
            "policy/influence_clip_fraction_upper": 0.3,
            "policy/dual_clip_fraction": 1e-6 * (step % 3),
            "policy/approx_kl": 2e-4 * (-1) ** step,
            "policy/entropy": 0.7 - 0.01 * step,
            "generated/accuracy": 0.2 + 0.01 * step,
            "batch/response_length/mean": 300.0 + 5 * step,
            "batch/response_length/q75": 500.0 + 4 * step,
            "sampling/prompts_generated": 32.0,
            "sampling/all_correct": 0.4 * step,
            "sampling/all_incorrect": 2.0,
            "moe/idle_experts": 0.3,
            "mismatch/abs_mean": 0.004 + 0.001 * (step % 2),
        }
        for step in range(1, steps + 1)
    ]


def one_update(rows: list[Row]) -> None:
    for row in rows[10:]:
        row |= {"policy/updates": 1.0, "policy/influence_weight_max": 1.0, "policy/influence_clip_fraction_upper": 0.0}


def collapse(rows: list[Row]) -> None:
    rows[40]["policy/dual_clip_fraction"] = 5e-3
    rows[42]["policy/approx_kl"] = 0.2


def no_entropy(rows: list[Row]) -> None:
    for row in rows[30:]:
        row["policy/entropy"] = 0.01


def stagnation(rows: list[Row]) -> None:
    for row in rows[20:]:
        row |= {"batch/response_length/q75": 950.0, "batch/response_length/mean": 700.0}


def equal_groups(rows: list[Row]) -> None:
    for row in rows[30:]:
        row |= {"sampling/all_correct": 20.0, "sampling/all_incorrect": 10.0}


def mismatch(rows: list[Row]) -> None:
    for row in rows[30:]:
        row["mismatch/abs_mean"] = 0.02


def at_bound(rows: list[Row]) -> None:
    for row in rows[20:]:
        row["policy/influence_clip_fraction_upper"] = 0.6  # of four updates; 0.8 of the later three


def idle_experts(rows: list[Row]) -> None:
    for row in rows[20:]:
        row["moe/idle_experts"] = 0.7


def undecided(rows: list[Row]) -> None:
    rows[12] |= {"generated/verifier_timeouts": 2.0, "generated/verifier_errors": 1.0}


FAULTS = {
    "FIPO does nothing": (one_update, 15),
    "Collapse begins": (collapse, 43),
    "Entropy collapsed": (no_entropy, 35),
    "Length stands at the limit": (stagnation, 40),
    "Few groups are informative": (equal_groups, 35),
    "The engine drifts from the trainer": (mismatch, 33),
    "Influence weights are at their bound": (at_bound, 25),
    "The routers collapse": (idle_experts, 24),
    "The verifier could not decide": (undecided, 13),
}


def test_a_healthy_run_is_silent() -> None:
    """No rule holds at any step of a run that learns, its warm-up's first step included."""
    assert findings(healthy(), LIMITS) == []


@pytest.mark.parametrize("name", FAULTS)
def test_a_rule_finds_its_fault(name: str) -> None:
    """A history with one fault has that finding alone, from the step at which there is enough to see."""
    rows = healthy()
    spoil, first = FAULTS[name]
    spoil(rows)
    found = findings(rows, LIMITS)
    assert [(f.rule.name, f.first) for f in found] == [(name, first)]


def test_every_rule_is_tried() -> None:
    """There is a fault for each rule, and each rule says where it comes from."""
    assert {rule.name for rule in RULES} == set(FAULTS)
    assert all(rule.source in ("paper", "code", "choice") and rule.reason.rstrip(")").endswith(".") for rule in RULES)


def test_a_spike_alone_or_a_jump_alone_is_no_collapse() -> None:
    """The rule wants the spike first and the jump within five steps of it."""
    for changes in (
        {40: {"policy/dual_clip_fraction": 5e-3}},
        {42: {"policy/approx_kl": 0.2}},
        {30: {"policy/dual_clip_fraction": 5e-3}, 42: {"policy/approx_kl": 0.2}},
    ):
        rows = healthy()
        for place, change in changes.items():
            rows[place] |= change
        assert findings(rows, LIMITS) == []


def test_the_first_update_does_not_hide_weights_at_their_bound() -> None:
    """With two updates a step, half of all tokens at the bound means every token of the later update."""
    rows = [{**row, "policy/updates": 2.0, "policy/influence_clip_fraction_upper": 0.49} for row in healthy(10)]
    assert [f.rule.name for f in findings(rows, LIMITS)] == ["Influence weights are at their bound"]
    assert "98%" in findings(rows, LIMITS)[0].seen


def test_a_rule_begins_once() -> None:
    """While a rule holds, or pauses for up to ten steps, it is one finding; after that it begins anew."""
    rows = healthy(200)
    for row in rows:
        row |= {"policy/entropy": 0.5, "generated/accuracy": 0.5, "sampling/all_correct": 2.0}
        row |= {"batch/response_length/q75": 500.0}
    for row in [*rows[50:60], *rows[65:80], *rows[120:150]]:
        row |= {"sampling/all_correct": 30.0}
    watch = Watch(LIMITS)
    begun = [int(row["step"]) for row in rows if watch.update(row)]
    assert begun == [55, 125]
    assert [(f.first, f.last) for f in watch.findings] == [(55, 80), (125, 150)]


def test_missing_and_empty_metrics_are_no_fault() -> None:
    """Rows without metrics, or with None and NaN, break no rule and no rule breaks on them."""
    bare = [{"step": s} for s in range(1, 60)]
    empty = [{name: (step if name == "step" else None) for name in healthy(1)[0]} for step in range(1, 60)]
    nan = [{name: (step if name == "step" else float("nan")) for name in healthy(1)[0]} for step in range(1, 60)]
    assert [findings(rows, LIMITS) for rows in (bare, empty, nan)] == [[], [], []]


def _line(row: Row) -> Row:
    """A row with what the log's line shows."""
    return {**row, "policy/ppo_clip_fraction": 0.0, "policy/grad_norm": 1.0, "time/step": 1.0}


def test_mismatch_is_in_the_line_while_its_rule_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line has the batch's reward and length, the accuracy of what is generated, and from step 33 the mismatch."""
    rows = healthy(40)
    for row in rows:
        row["batch/reward"] = -0.25
    mismatch(rows)
    config = Config(run=RunConfig(directory=str(tmp_path)), rollout=RolloutConfig(max_response_tokens=1000, save=False))
    log = RunLog(config, rank=0)
    log.open(0, 0.0)
    for row in rows:
        log.step(int(row["step"]), {n: v for n, v in _line(row).items() if n != "step"})
    log.close()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert lines[0].startswith("step   1/100  reward -0.250  length 305  accuracy 0.210  kl -2.0e-04")
    shown = [line for line in lines if "mismatch" in line]
    assert shown == lines[32:]
    assert all("  grad 1.00  mismatch 0.02  1.0 s" in line for line in shown)


def test_training_warns_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The log prints a finding when it begins, and a resumed run does not repeat it."""
    rows = healthy(30)
    one_update(rows)
    config = Config(run=RunConfig(directory=str(tmp_path)), rollout=RolloutConfig(max_response_tokens=1000, save=False))
    log = RunLog(config, rank=0)
    log.open(0, 0.0)
    for row in rows[:18]:
        log.step(int(row["step"]), {n: v for n, v in _line(row).items() if n != "step"})
    log.close()
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert len(warned) == 1
    assert warned[0].startswith("warning: FIPO does nothing: every influence weight of the last 5 steps is exactly 1")
    assert len(json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])) > 10
    log = RunLog(config, rank=0)
    log.open(18, 0.0)
    for row in rows[18:]:
        log.step(int(row["step"]), {n: v for n, v in _line(row).items() if n != "step"})
    log.close()
    assert "warning" not in capsys.readouterr().out
