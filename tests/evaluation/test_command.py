"""`eval` from its start to its tables: what it keeps, what it goes on with, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from megatron_fipo.config import Config, to_yaml
from megatron_fipo.evaluation import command
from megatron_fipo.evaluation.evaluate import load_benchmarks
from megatron_fipo.evaluation.store import Store, settings_of, weights_fingerprint
from megatron_fipo.model.stop_tokens import load_tokenizer
from tests.support.policies import make_config, make_task
from tests.support.ranks import run_ranks
from tests.support.waiting import PATIENCE, wait_until

ROOT = Path(__file__).parents[2]
K, PROBLEMS, CHUNK = 3, 6, 4


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy and 8 validation problems."""
    return make_task(tmp_path_factory.mktemp("task") / "base")


@pytest.fixture(autouse=True)
def counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `counted` counts the responses that it judges."""
    monkeypatch.setenv("FIPO_TEST_COUNTS", str(tmp_path / "counts"))
    return tmp_path / "counts"


def _config(task: Path, **sections: dict[str, Any]) -> Config:
    changed: dict[str, dict[str, Any]] = {
        "data": {"train": f"{task}/train.parquet", "validation": f"{task}/validation.parquet", "max_prompt_tokens": 16},
        "rollout": {"max_response_tokens": 12, "batch_size": CHUNK},
        "reward": {"function": "tests.support.samples:counted", "overlong_buffer_tokens": 0},
        "eval": {"samples": K, "max_problems": PROBLEMS, "top_p": 1.0},
    }
    merged = {name: {**changed.get(name, {}), **sections.get(name, {})} for name in {*changed, *sections}}
    return make_config(task, **merged)


def _run(config: Config, out: Path, environment: dict[str, str] | None = None) -> None:
    os.environ.update(environment or {})  # in a rank's own process
    command.run(config, out)


def _eval(config: Config, out: Path, ranks: int = 1, **environment: str) -> dict[str, Any]:
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, world_size=ranks))
    run_ranks(_run, ranks, config, out, {"FIPO_TEST_COUNTS": os.environ["FIPO_TEST_COUNTS"], **environment})
    return json.loads((out / "summary.json").read_text())


def _rows(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "samples.parquet").to_pylist()


def _judged(counts: Path) -> int:
    return sum(map(int, counts.read_text().split()))


def test_tables(task: Path, tmp_path: Path) -> None:
    """A row a sample and a row a problem, which give the figures once more."""
    summary = _eval(_config(task), tmp_path / "out")
    rows = _rows(tmp_path / "out")
    problems = pq.read_table(tmp_path / "out" / "problems.parquet").to_pylist()
    truths = pq.read_table(task / "validation.parquet").to_pylist()
    assert [(r["problem"], r["number"]) for r in rows] == [(p, k) for p in range(PROBLEMS) for k in range(K)]
    assert len({r["seed"] for r in rows}) == PROBLEMS * K
    assert {r["benchmark"] for r in rows} == {"validation"}
    for row in rows:
        assert row["ground_truth"] == truths[row["row"]]["reward_model"]["ground_truth"]
        assert row["prompt"] == truths[row["row"]]["prompt"]
        assert row["truncated"] <= (row["length"] == 12)
    assert summary["avg@k"] == sum(r["accuracy"] for r in rows) / len(rows)
    assert summary["length"] == sum(r["length"] for r in rows) / len(rows)
    assert summary["pass@k"] == sum(p["correct"] > 0 for p in problems) / PROBLEMS
    assert summary["cons@k"] == pytest.approx(sum(p["cons"] for p in problems) / PROBLEMS)
    assert summary["cons_answered@k"] == pytest.approx(sum(p["cons_answered"] for p in problems) / PROBLEMS)
    assert summary["answered"] == 1 - sum(p["without_answer"] for p in problems) / len(rows)
    assert (summary["samples"], summary["problems"]) == (K, PROBLEMS)


def test_going_on_is_exact(task: Path, tmp_path: Path, counts: Path) -> None:
    """An evaluation that failed in its third chunk ends as one that did not, and draws only what it lacked."""
    expected = _eval(_config(task), tmp_path / "undisturbed")
    assert _judged(counts) == K * PROBLEMS
    counts.unlink()
    with pytest.raises(RuntimeError, match="stopped as the test wants it"):
        _eval(_config(task), tmp_path / "out", FIPO_TEST_STOP_AT="3")
    counts.unlink()
    assert _eval(_config(task), tmp_path / "out") == expected
    assert _judged(counts) == K * PROBLEMS - 2 * CHUNK
    assert _rows(tmp_path / "out") == _rows(tmp_path / "undisturbed")


@pytest.mark.distributed
def test_asked_to_stop(task: Path, tmp_path: Path, counts: Path) -> None:
    """One of two ranks is: both stop at their next response, what was judged is kept, and nothing is summarized."""
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="Interrupted"):
        _eval(_config(task), out, ranks=2, FIPO_TEST_ASK_AT="1")
    kept = Store(out).read()
    assert CHUNK < len(kept) == _judged(counts) < K * PROBLEMS
    assert len({sample.key for sample in kept}) == len(kept)
    assert not (out / "summary.json").exists()


@pytest.mark.distributed
def test_going_on_with_other_ranks(task: Path, tmp_path: Path, counts: Path) -> None:
    """Two ranks draw the same as one; and finish, without drawing it again, what one began."""
    expected = _eval(_config(task), tmp_path / "one")
    counts.unlink()
    assert _eval(_config(task), tmp_path / "two", ranks=2) == expected
    assert _judged(counts) == K * PROBLEMS
    counts.unlink()
    with pytest.raises(RuntimeError, match="stopped as the test wants it"):
        _eval(_config(task), tmp_path / "out", FIPO_TEST_STOP_AT="3")
    counts.unlink()
    assert _eval(_config(task), tmp_path / "out", ranks=2) == expected
    assert _judged(counts) == K * PROBLEMS - 2 * CHUNK


def test_more_of_everything_keeps_what_is_there(task: Path, tmp_path: Path, counts: Path) -> None:
    """More samples, problems and benchmarks draw what is new; fewer again draw nothing, and give the first figures."""
    out, validation = tmp_path / "out", f"{task}/validation.parquet"
    first = _eval(_config(task), out)
    kept = _rows(out)
    counts.unlink()
    both = {"validation": validation, "train": f"{task}/train.parquet"}
    more = _config(task, data={"validation": both}, eval={"samples": K + 1, "max_problems": PROBLEMS + 1})
    summary = _eval(more, out)
    assert _judged(counts) == 2 * (K + 1) * (PROBLEMS + 1) - K * PROBLEMS
    rows = {(r["benchmark"], r["problem"], r["number"]): r["response"] for r in _rows(out)}
    assert all(rows[r["benchmark"], r["problem"], r["number"]] == r["response"] for r in kept)
    assert summary["avg@k"] == pytest.approx(sum(b["avg"] for b in summary["benchmarks"].values()) / 2)
    assert set(summary["benchmarks"]) == {"validation", "train"}
    counts.unlink()
    assert _eval(_config(task), out) == first
    assert not counts.exists()


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"eval": {"top_p": 0.5}}, r"eval.top_p: 1.0 -> 0.5"),
        ({"run": {"seed": 2}}, r"run.seed: 1 -> 2"),
        ({"rollout": {"max_response_tokens": 13}}, r"rollout.max_response_tokens: 12 -> 13"),
    ],
)
def test_other_settings_are_refused(task: Path, tmp_path: Path, sections: dict[str, dict[str, Any]], says: str) -> None:
    """Before any rank starts, with what to do; k and the layout are no such settings."""
    out = tmp_path / "out"
    run_ranks(_claim, 1, _config(task), out)
    command.check(_config(task, eval={"samples": 9}, parallel={"world_size": 2, "tensor": 2}), out)
    with pytest.raises(
        ValueError, match=rf"other settings:\n  - {says}\nRestore these settings, choose another --out, or rem"
    ):
        command.check(_config(task, **sections), out)


def _claim(config: Config, out: Path) -> None:
    Store(out).claim(settings_of(config, load_benchmarks(config, load_tokenizer(config.model.hf_path))))


def test_other_weights_are_refused(task: Path, tmp_path: Path) -> None:
    """A checkpoint elsewhere with the same weights is the same one; one number more or less is not."""
    other = make_task(tmp_path / "other", seed=1)
    same = make_task(tmp_path / "same")
    assert weights_fingerprint(task) == weights_fingerprint(same) != weights_fingerprint(other)
    run_ranks(_claim, 1, _config(task), tmp_path / "out")
    command.check(_config(task, model={"hf_path": str(same)}), tmp_path / "out")
    with pytest.raises(ValueError, match=r"  - weights_fingerprint: \w+ -> \w+\n"):
        command.check(_config(task, model={"hf_path": str(other)}), tmp_path / "out")


def test_evaluation_of_an_earlier_release_is_continued(task: Path, tmp_path: Path, counts: Path) -> None:
    """Its samples, in another directory and with other keys of settings.json, are not generated again; other weights
    are refused. The result equals that of an undisturbed evaluation."""
    expected, other = _eval(_config(task), tmp_path / "undisturbed"), make_task(tmp_path / "other", seed=1)
    out = tmp_path / "out"
    counts.unlink()
    with pytest.raises(RuntimeError, match="stopped as the test wants it"):
        _eval(_config(task), out, FIPO_TEST_STOP_AT="3")
    settings = json.loads((out / "settings.json").read_text())
    start, weights = settings.pop("start_time"), settings.pop("weights_fingerprint")
    problems = settings.pop("problems_fingerprint.validation")
    former = {"the evaluation's beginning": start, "the weights": weights, "the problems of validation": problems}
    (out / "settings.json").write_text(json.dumps({**former, **settings}))
    (out / "samples").rename(out / "drawn")
    assert Store(out).began().isoformat() == start
    assert Store(out).count() == len(Store(out).read()) == 2 * CHUNK
    with pytest.raises(ValueError, match=r"other settings:\n  - weights_fingerprint: \w+ -> \w+\n"):
        command.check(_config(task, model={"hf_path": str(other)}), out)
    counts.unlink()
    assert _eval(_config(task), out) == expected
    assert _judged(counts) == K * PROBLEMS - 2 * CHUNK
    assert _rows(out) == _rows(tmp_path / "undisturbed")
    assert json.loads((out / "settings.json").read_text()) == {
        **settings,
        "start_time": start,
        "weights_fingerprint": weights,
        "problems_fingerprint.validation": problems,
    }


def test_default_directory(task: Path) -> None:
    """Named for the checkpoint, inside the run's directory."""
    config = _config(task, run={"name": "x"}, model={"megatron_path": "runs/x/checkpoints/step_40/"})
    assert config.evaluation_directory == Path("runs/x/evaluation/step_40")


@pytest.mark.slow
def test_killed_in_the_middle(task: Path, tmp_path: Path, counts: Path) -> None:
    """The command, killed by SIGKILL and started again, says what an undisturbed one says, of the finished samples
    without drawing them again."""
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(_config(task)))
    expected = _command(file, tmp_path / "undisturbed")
    counts.unlink()
    out = tmp_path / "out"
    with _start(file, out, FIPO_TEST_HANG_AT="4") as process:
        try:
            wait_until(lambda: process.poll() is not None or len(list(out.glob("samples/[!.]*.parquet"))) >= 3)
            assert process.poll() is None
        finally:
            process.send_signal(signal.SIGKILL)
    counts.unlink()
    again = _command(file, out)
    assert {**again, "out": ""} == {**expected, "out": ""}
    assert _judged(counts) == K * PROBLEMS - 3 * CHUNK
    assert _rows(out) == _rows(tmp_path / "undisturbed")


def _start(file: Path, out: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_fipo.cli", "eval", str(file), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def _command(file: Path, out: Path) -> dict[str, Any]:
    with _start(file, out) as process:
        stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    return json.loads(stdout.splitlines()[-1])
