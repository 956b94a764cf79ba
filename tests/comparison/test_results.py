"""Saved runs: their states, whether they belong to the specification, their endpoints, and the report of them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_fipo.comparison.endpoints import endpoint_value
from megatron_fipo.comparison.page import comparison_page
from megatron_fipo.comparison.results import read_results
from megatron_fipo.comparison.runs import PlannedRun, check_saved, plan_runs, state_of
from megatron_fipo.comparison.spec import Endpoint, Spec, read_spec
from megatron_fipo.comparison.tables import as_json, terminal_report
from megatron_fipo.report.history import read_run
from tests.comparison.conftest import finish, record

Planned = tuple[Spec, list[PlannedRun]]


def test_states(planned: Planned) -> None:
    """A run is missing, unfinished, failed or finished by what it left; the program's failures are counted."""
    run = planned[1][0]
    assert state_of(run).status == "missing"
    record(run, "start")
    assert state_of(run).status == "unfinished"
    record(run, "failed", "machine", "rank 0 was killed")
    assert (state_of(run).status, state_of(run).cause) == ("unfinished", "rank 0 was killed")
    record(run, "failed", "program", "GradientError: not finite\nmore")
    assert (state_of(run).status, state_of(run).cause) == ("failed", "GradientError: not finite")
    record(run, "start")
    assert (state_of(run).status, state_of(run).failures) == ("unfinished", 1)
    finish(run, 0.5, 10.0)
    assert (state_of(run).status, state_of(run).failures) == ("finished", 1)
    (run.directory / "summary.json").write_text('{"steps": 3}')  # of a shorter run
    assert state_of(run).status == "unfinished"


def test_changed_settings_are_refused(planned: Planned, tmp_path: Path) -> None:
    """A saved run with another setting of the loss, or of what an endpoint measures, does not belong here."""
    spec, runs = planned
    finish(runs[0], 0.5, 10.0)
    assert check_saved(spec, runs) == ()
    config = tmp_path / "config.yaml"
    legal = config.read_text()
    for old, new in (
        ("samples: 2", "samples: 4"),
        ("train.parquet", "other.parquet"),
        ("max_steps: 4", "max_steps: 6"),
    ):
        config.write_text(legal.replace(old, new))
        with pytest.raises(ValueError, match="made with other settings:\n  - F-seed1: ") as refused:
            check_saved(spec, plan_runs(spec))
        assert new.split(": ")[-1] in str(refused.value)
    config.write_text(legal + "checkpoint: {every: 3}\n")  # decides nothing
    assert check_saved(spec, plan_runs(spec)) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"endpoints": {"score": {"last": 1}, "length": {"last": 3}}}, "a comparison with other endpoints"),
        ({"pairs": [["D", "F"]]}, "a comparison with other pairs"),
        ({"arms": {"F": {}, "D": {"algorithm.loss": "grpo"}}}, "a comparison with other arms"),
        ({"settings": {"optimizer.lr": 1.0}, "error_rate": 0.1}, "a comparison with other settings, error_rate"),
        ({"seeds": 2}, "seeds 3 are part of the comparison"),
    ],
)
def test_what_is_compared_is_fixed(changes: dict, message: str, planned: Planned, write_spec: Callable) -> None:
    """Arms, pairs, endpoints and settings stay those of the first start; seeds are not removed."""
    spec = read_spec(write_spec(**changes))
    with pytest.raises(ValueError, match=message):
        check_saved(spec, plan_runs(spec))


def test_added_seeds_are_named(planned: Planned, write_spec: Callable) -> None:
    """They are allowed, and the report says which."""
    spec = read_spec(write_spec(seeds=5))
    runs = plan_runs(spec)
    assert check_saved(spec, runs) == (4, 5)
    assert "seeds 4, 5 were added after the first runs" in terminal_report(read_results(spec, runs, (4, 5)))


def test_endpoints_are_means_of_the_last_values(planned: Planned) -> None:
    """The last evaluations or steps count; the logarithm is of the mean."""
    run = planned[1][0]
    finish(run, 0.5, 10.0)
    path = run.directory / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for step, row in enumerate(rows, start=1):
        row["batch/response_length/mean"] = 10.0 * step
    rows[1]["eval/avg@k"], rows[3]["eval/avg@k"] = 0.25, 0.75
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved = read_run(run.directory)
    length = Endpoint("length", "batch/response_length/mean", 3, 0.05, log=True)
    assert endpoint_value(saved, length) == pytest.approx(math.log(30.0))
    assert endpoint_value(saved, Endpoint("score", "eval/avg@k", 1, 0.01)) == 0.75
    assert endpoint_value(saved, Endpoint("score", "eval/avg@k", 2, 0.01)) == 0.5
    with pytest.raises(ValueError, match="no finite value in 1 of the last 3"):
        endpoint_value(saved, Endpoint("score", "eval/avg@k", 3, 0.01))
    rows[2]["batch/response_length/mean"] = None  # was not finite
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="no finite value at step 3"):
        endpoint_value(read_run(run.directory), length)


def _finish_all(runs: list[PlannedRun], without: tuple[str, ...] = ()) -> None:
    """F is better by 0.1 to 0.12 and 10% longer; problem 1 is the one that it learns."""
    for run in runs:
        better = run.arm == "F"
        score = 0.5 + 0.01 * run.seed + (0.1 + 0.01 * (run.seed % 3)) * better
        if run.name not in without:
            finish(run, score, 10.0 * (1.1 if better else 1.0) * (1 + run.seed % 2), (0.5, 0.5 + 0.2 * better, 1.0))


def test_report_of_a_finished_comparison(planned: Planned) -> None:
    """The numbers of the directories are in the text, the JSON and the page; the winner is named."""
    spec, runs = planned
    _finish_all(runs)
    results = read_results(spec, runs)
    score, length = results.comparisons
    assert score.differences == pytest.approx({1: 0.11, 2: 0.12, 3: 0.10})
    assert length.differences == pytest.approx(dict.fromkeys((1, 2, 3), math.log(1.1)))
    assert (score.winner, length.winner, length.reason) == ("F", None, "the differences have no spread")
    low, high = results.bootstrap["score", "F - D"]
    assert low == 0.0  # a resample without problem 1
    assert high == pytest.approx(0.2)  # one with no other
    text = terminal_report(results)
    (line,) = [line for line in text.splitlines() if line.strip().startswith("score") and "3 of 3" in line]
    assert line.split()[:8] == ["score", "F", "-", "D", "3", "of", "3", "+0.11"]
    assert "score, F - D: F is higher by 0.11" in text
    assert "without, the sign-flip test's p is 0.25 (Holm)" in text
    assert max(map(len, text.partition("\n\n")[0].splitlines())) <= 100
    content = json.loads(as_json(results))
    assert content["comparisons"][0]["differences"] == score.differences or content["comparisons"][0]["winner"] == "F"
    assert content["runs"][0]["score"] == pytest.approx(0.62)
    assert content["comparisons"][0]["power"]["needed"] >= 2
    page = comparison_page(results, "")
    assert page.count("<img") == 2
    assert "6 runs: 6 finished." in page
    assert not re.search(r"https?:|<script|<link|@import|url\(", re.sub(r'"data:[^"]+"', "", page))


def test_failed_and_missing_runs_are_shown(planned: Planned) -> None:
    """A failed run counts in its arm and as the worst case; a missing one leaves the comparison incomplete."""
    spec, runs = planned
    _finish_all(runs, without=("F-seed2", "D-seed3"))
    failed = next(run for run in runs if run.name == "F-seed2")
    record(failed, "failed", "program", "GradientError: not finite")
    results = read_results(spec, runs)
    assert results.tables["score"]["F", 2] is None
    assert ("D", 3) not in results.tables["score"]
    assert {one.failed + one.missing for one in results.comparisons} == {(2, 3)}
    assert results.common_seeds(spec.endpoints[0]) == [1]
    text = terminal_report(results)
    assert "score, F - D: incomplete: seeds 3 are not finished" in text
    assert "F-seed2 failed: GradientError: not finite" in text
    assert [line.split()[:5] for line in text.splitlines() if line.startswith((" F ", " D "))] == [
        ["F", "2", "1", "0", "0"],
        ["D", "2", "0", "0", "1"],
    ]


def test_means_of_arms_are_over_the_same_seeds(planned: Planned) -> None:
    """A failed seed with a low score does not lift its arm's mean: the other arm loses the seed as well."""
    spec, runs = planned
    for run in runs:
        if run.name != "F-seed1":
            finish(run, 0.1 if run.seed == 1 else 0.9, 10.0)
    record(runs[0], "failed", "program")
    results = read_results(spec, runs)
    score = spec.endpoints[0]
    assert (results.mean_of("F", score), results.mean_of("D", score)) == ((0.9, 0.0), (0.9, 0.0))


def test_a_finished_run_without_a_finite_endpoint_counts_as_failed(planned: Planned) -> None:
    """It does for that endpoint alone, and the report says so."""
    spec, runs = planned
    _finish_all(runs)
    path = runs[0].directory / "metrics.jsonl"
    path.write_text(
        path.read_text().replace('"batch/response_length/mean": 22.0', '"batch/response_length/mean": null')
    )
    results = read_results(spec, runs)
    assert [one.failed for one in results.comparisons] == [(), (1,)]
    assert "length: counted as failed" in terminal_report(results)


def test_no_bootstrap_over_different_problems(planned: Planned) -> None:
    """Where a seed was evaluated on other problems, or samples were not saved, the report says why there is none."""
    spec, runs = planned
    _finish_all(runs)
    finish(runs[0], 0.62, 22.0, (0.5, 0.5))
    results = read_results(spec, runs)
    assert results.bootstrap == {}
    assert "no bootstrap, since seeds were evaluated on other problems" in terminal_report(results)
    (runs[0].directory / "evaluation" / "step_2.parquet").unlink()
    assert "samples were not saved (eval.save)" in terminal_report(read_results(spec, runs))
