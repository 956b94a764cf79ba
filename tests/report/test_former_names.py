"""Runs of an earlier release, with other names of metrics, are resumed, reported and compared like new ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo import former_names
from megatron_fipo.config import Config, RolloutConfig, RunConfig
from megatron_fipo.evaluation import Evaluation
from megatron_fipo.metric_glossary import entry_of
from megatron_fipo.report.history import read_run
from megatron_fipo.report.page import write_report
from megatron_fipo.resume import Progress
from megatron_fipo.run_log import RunLog
from tests.report.test_report import AFTER, BEFORE, rows_of, summary_of, write_run

STEPS = 30
# By hand, not from the table that is tested.
FORMER = {
    "sampling/all_correct": "sampling/groups_all_right",
    "sampling/all_incorrect": "sampling/groups_all_wrong",
    "generated/reward": "reward/mean",
    "generated/accuracy": "reward/accuracy",
    "generated/verifier_timeouts": "reward/verifier_timeouts",
    "generated/verifier_errors": "reward/verifier_errors",
    "generated/response_length/mean": "response_length/mean",
    "generated/response_length/min": "response_length/min",
    "generated/response_length/q25": "response_length/q25",
    "generated/response_length/median": "response_length/median",
    "generated/response_length/q75": "response_length/q75",
    "generated/response_length/max": "response_length/max",
    "generated/response_length/correct": "response_length/correct",
    "generated/response_length/incorrect": "response_length/incorrect",
    "generated/truncated": "response_length/truncated",
    "batch/response_length/mean": "batch/response_length",
    "policy/approx_kl": "policy/policy_kl",
    "mismatch/abs_mean": "mismatch/rollout_mismatch_abs",
    "mismatch/abs_max": "mismatch/rollout_mismatch_abs_max",
    "mismatch/k1": "mismatch/rollout_mismatch_k1",
    "mismatch/k3": "mismatch/rollout_mismatch_k3",
    "mismatch/outside_fraction": "mismatch/rollout_mismatch_outside_fraction",
    "mismatch/ratio_p999": "mismatch/rollout_mismatch_ratio_p999",
    "eval/cons_answered@k": "eval/cons@k",  # where no metric has the new name: answers alone voted
    "eval/cons_answered@k/low": "eval/cons@k/low",
    "eval/aime24/cons_answered@k": "eval/aime24/cons@k",
    "eval/length/correct": "eval/length/right",
    "eval/length/incorrect_median": "eval/length/wrong_median",
    "eval/aime24/length/incorrect": "eval/aime24/length/wrong",
    "eval/aime24/length/correct_median": "eval/aime24/length/right_median",
}
OLDER = {  # names of still earlier releases
    "generated/response_length/correct": "response_length/right",
    "generated/response_length/incorrect": "response_length/wrong",
}
NEW = ("eval/cons@k", "eval/answered")  # what an earlier release did not log


def _rows() -> list[dict[str, float]]:
    """Return rows with every renamed metric, in which rules about two of them hold."""
    rows = [{name: value for name, value in row.items() if name not in NEW} for row in rows_of(STEPS)]
    for row in rows:
        row |= {name: 0.5 + row["step"] / 64 + n / 1024 for n, name in enumerate(FORMER) if "eval/" not in name}
        row |= {"sampling/prompts_generated": 4.0, "sampling/all_correct": 3.0, "sampling/all_incorrect": 1.0}
        row["mismatch/abs_mean"] = 0.004 if row["step"] < 25 else 0.25
        if "eval/avg@k" in row:
            row |= {name: 100.0 + row["step"] + n for n, name in enumerate(FORMER) if "eval/" in name}
    return rows


def _formerly(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{FORMER.get(name, name): value for name, value in row.items()} for row in rows]


def _write(directory: Path, rows: list[dict[str, float]], consensus: str = "cons_answered@k") -> Path:
    """`consensus`: its name in the summary."""
    scores = [{"avg@k": s["avg@k"], consensus: s["cons_answered@k"], "pass@k": s["pass@k"]} for s in (BEFORE, AFTER)]
    return write_run(directory, rows, summary_of(*scores))


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    """Return a run by the current names, by the former ones, and one that another release resumed."""
    rows, former = _rows(), _formerly(_rows())
    return {
        "new": _write(tmp_path / "new", rows),
        "old": _write(tmp_path / "old", former, "cons@k"),
        "both": _write(tmp_path / "both", [*former[:12], *rows[12:]]),
    }


def test_former_names_have_entries() -> None:
    """Each is replaced by a metric of the glossary, and no former name is one."""
    for names in (FORMER, OLDER):
        assert former_names.current_metrics(dict.fromkeys(names.values(), 1.0)) == dict.fromkeys(names, 1.0)
    assert set(former_names.METRICS) <= {*FORMER.values(), *OLDER.values()}
    assert [new for new in FORMER if entry_of(new) is None] == []
    assert [name for name in former_names.METRICS if entry_of(name) is not None] == []


def test_current_names_stay() -> None:
    """Names that only resemble a former one are not changed."""
    names = [
        *FORMER,
        *NEW,
        "eval/cons@k/low",
        "eval/aime24/cons@k",
        "eval/right",
        "right",
        "eval/length",
        "eval/length/median",
        "policy/policy_kl_max",
    ]
    assert list(former_names.current_metrics(dict.fromkeys(names, 0.0))) == names


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("kind", ["old", "both"])
def test_report_is_the_same(runs: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """Rows, the terminal's text and the page with every number and finding equal those by the current names."""
    assert read_run(runs[kind]).rows == read_run(runs["new"]).rows
    assert read_run(runs[kind]).evaluations == read_run(runs["new"]).evaluations
    said, page = {}, {}
    for name in ("new", kind):
        said[name] = write_report(runs[name], tmp_path / "page.html")
        page[name] = (tmp_path / "page.html").read_text()
    assert said["new"] == said[kind]
    assert page["new"] == page[kind]
    assert "100% of the groups are all correct (75%) or all incorrect" in page[kind]
    assert "mean |trainer - engine| is 0.25 nats a token, 0.004 in the first 20 steps" in page[kind]


@pytest.mark.usefixtures("no_figures")
def test_comparison_is_the_same(runs: dict[str, Path], tmp_path: Path) -> None:
    """An old run beside a new one: one row a metric, with a number of both in it."""
    write_report([runs["old"], runs["new"]], tmp_path / "page.html")
    table = (tmp_path / "page.html").read_text().partition("Latest value of every metric")[2]
    last = _rows()[-1]
    for name in FORMER:
        assert f"<th scope=row>{name}</th><td>{last[name]!r}</td><td>{last[name]!r}</td>" in table
    assert not any(f">{name}<" in table for name in FORMER.values())


def test_figures_of_former_names_are_removed(runs: dict[str, Path]) -> None:
    """A figure that an earlier release wrote under another name does not stay beside the new one."""
    folder = runs["old"] / "figures"
    folder.mkdir()
    for name in ("policy_kl.png", "right_and_wrong.png"):
        (folder / name).write_bytes(b"old")
    write_report(runs["old"])
    names = {path.name for path in folder.iterdir()}
    assert {"approx_kl.png", "correct_and_incorrect.png"} <= names
    assert not names & {"policy_kl.png", "right_and_wrong.png"}


def test_resumed_run_has_one_set_of_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The attempt renames the rows that stay; numbers are unchanged, and a finding that holds is not repeated."""
    rows = _rows()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _formerly(rows)))
    config = Config(run=RunConfig(directory=str(tmp_path)), rollout=RolloutConfig(max_response_tokens=1000, save=False))
    log = RunLog(config, rank=0)
    log.open(STEPS - 2, 0.0)
    shown = {"policy/ppo_clip_fraction": 0.0, "policy/grad_norm": 1.0, "time/step": 1.0}
    for row in rows[-2:]:
        log.step(int(row["step"]), {name: value for name, value in (row | shown).items() if name != "step"})
    log.close()
    assert "groups are all correct" not in capsys.readouterr().out
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written[:-2] == rows[:-2]
    assert [row.keys() for row in written[-2:]] == [row.keys() | shown.keys() for row in rows[-2:]]


def test_checkpoint_of_an_earlier_release() -> None:
    """Lengths and consensus of its evaluations and the metrics of its unlogged step get current names."""
    figures: dict[str, Any] = {"samples": 2, "problems": 1, "avg": 0.5, "cons": 0.5, "pass_": 1.0, "length": 15.0}
    figures |= {"truncated": 0.0, "lengths": {"q10": 11.0, "right": 10.0, "wrong_median": 20.0}}
    figures |= {"intervals": {"avg@k": [0.25, 0.75], "cons@k": [0.0, 1.0]}}
    state = Progress(step=3).state_dict() | {"before": figures | {"benchmarks": {"a": figures, "b": figures}}}
    progress = Progress.from_state_dict(state | {"unlogged": {"policy/policy_kl": 0.5, "policy/loss": 1.0}})
    assert progress.unlogged == {"policy/approx_kl": 0.5, "policy/loss": 1.0}
    assert Progress.from_state_dict({name: state[name] for name in ("step", "before", "after")}).unlogged is None
    lengths = {"q10": 11.0, "correct": 10.0, "incorrect_median": 20.0}
    assert isinstance(progress.before, Evaluation)
    assert progress.before.lengths == lengths
    assert progress.before.scores() == {"avg@k": 0.5, "cons_answered@k": 0.5, "pass@k": 1.0}
    assert progress.before.intervals == {"avg@k": (0.25, 0.75), "cons_answered@k": (0.0, 1.0)}
    assert (progress.before.cons, progress.before.answered) == (None, None)
    assert "eval/answered" not in progress.before.metrics()
    assert [part.lengths for part in progress.before.benchmarks.values()] == [lengths, lengths]
