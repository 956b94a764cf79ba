"""`compare` with commands in place of `train`: what is run, skipped, counted, interrupted, and submitted to Slurm."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_fipo.cli import app
from megatron_fipo.comparison import command, runner
from megatron_fipo.comparison.runs import PlannedRun, plan_runs, state_of
from megatron_fipo.comparison.spec import Spec, read_spec
from megatron_fipo.config import load_config
from megatron_fipo.exit_codes import Interrupted
from tests.comparison.conftest import finish, record
from tests.support.waiting import wait_until

Planned = tuple[Spec, list[PlannedRun]]
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from megatron_fipo.config import load_config
from megatron_fipo.launch import attempts
from megatron_fipo.launch.attempts import Record
config = load_config(sys.argv[1])
out = config.run_directory
out.mkdir(parents=True, exist_ok=True)
def record(event, kind="", cause=""):
    attempts.append(out / "attempts.jsonl", Record(event, 1, kind=kind, cause=cause))
def stop(number, frame):
    record("interrupted")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
record("start")
how = json.loads((out.parent / "how.json").read_text()).get(config.run.name, "finish")
while how == "wait":
    time.sleep(0.05)
if how == "fail":
    record("failed", "program", "GradientError: not finite")
    sys.exit(1)
if how == "reject":
    print("error: data.train does not exist")
    sys.exit(2)
(out / "summary.json").write_text(json.dumps({"steps": config.trainer.max_steps}))
"""


@pytest.fixture
def train(planned: Planned, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """train(jobs=1, **how): train all unfinished runs by commands that end as `how` says; return its lines."""
    spec, runs = planned
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(runner, "train_command", lambda path: [sys.executable, str(script), str(path)])

    def run(jobs: int = 1, **how: str) -> list[str]:
        import json

        (spec.out / "how.json").write_text(json.dumps({name.replace("_", "-"): what for name, what in how.items()}))
        said: list[str] = []
        left = [one for one in runs if state_of(one).status not in ("finished", "failed")]
        runner.train_all(spec, left, jobs, said.append)
        return said

    return run


def _states(planned: Planned) -> list[str]:
    return [state_of(run).status for run in planned[1]]


def test_all_are_trained_and_failures_counted(train: Callable[..., list[str]], planned: Planned) -> None:
    """One after another, in order; a failed run does not end the others, and is not run again."""
    said = train(D_seed2="fail")
    assert _states(planned) == ["finished"] * 3 + ["failed"] + ["finished"] * 2
    assert [line.split(":")[0] for line in said if "started" in line] == [run.name for run in planned[1]]
    assert any(line.startswith("D-seed2: failed after") and line.endswith("GradientError: not finite") for line in said)
    assert train() == []


def test_rejected_input_ends_the_comparison(train: Callable[..., list[str]], planned: Planned) -> None:
    """Input that `train` refuses is an error of the specification, not a failed seed; nothing else is started."""
    with pytest.raises(ValueError, match=r"F-seed2 could not be trained: error: data\.train does not exist"):
        train(F_seed2="reject")
    assert _states(planned) == ["finished", "finished", "unfinished", "missing", "missing", "missing"]


def test_jobs_run_at_the_same_time_and_stop_together(train: Callable[..., list[str]], planned: Planned) -> None:
    """A signal goes to every run; all end, and the same command continues with what is left."""
    runs, handler = planned[1], signal.getsignal(signal.SIGTERM)
    waiting = {"F_seed1": "wait", "D_seed1": "wait", "F_seed2": "wait"}

    def interrupt() -> None:
        wait_until(lambda: all((run.directory / "attempts.jsonl").exists() for run in runs[:3]))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted, match="the same command continues"):
        train(jobs=3, **waiting)
    thread.join()
    assert _states(planned) == ["unfinished"] * 3 + ["missing"] * 3
    assert (runs[0].directory / "attempts.jsonl").read_text().count('"interrupted"') == 1
    train(jobs=2)
    assert _states(planned) == ["finished"] * 6
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize(
    ("numbers", "text"), [([1], "1"), ([1, 2, 3], "1-3"), ([1, 2, 4, 6, 7], "1-2,4,6-7"), ([9, 3], "3,9")]
)
def test_array_of_the_unfinished_runs(numbers: list[int], text: str, planned: Planned) -> None:
    """The command names them as Slurm does, with the tasks of a run."""
    spec, runs = planned
    by_number = {run.number: run for run in runs}
    some = [by_number.get(n) or PlannedRun("F", n, n, runs[0].config) for n in numbers]
    expected = (
        f"sbatch --array={text} --nodes=1 --ntasks-per-node=1 --gpus-per-node=1 slurm/compare.sh {spec.out}/configs"
    )
    assert runner.array_command(spec, some) == expected


@pytest.mark.parametrize(("ranks", "sizes"), [(4, (1, 4)), (8, (1, 8)), (32, (4, 8)), (12, (2, 6))])
def test_sizes_of_the_array(ranks: int, sizes: tuple[int, int], write_spec: Callable[..., Path]) -> None:
    """The job has as many nodes and tasks as there are ranks, at most 8 a node; arms of different sizes are refused."""
    spec = read_spec(write_spec(settings={"parallel.world_size": ranks}))
    assert f"--nodes={sizes[0]} --ntasks-per-node={sizes[1]} " in runner.array_command(spec, plan_runs(spec))
    arms = {"F": {}, "D": {"parallel.world_size": 2 * ranks}}
    spec = read_spec(write_spec(settings={"parallel.world_size": ranks}, arms=arms))
    with pytest.raises(ValueError, match="world_size differs between arms"):
        runner.array_command(spec, plan_runs(spec))


def test_prepare_runs_each_command_once(write_spec: Callable[..., Path], tmp_path: Path) -> None:
    """Once per seed that needs it; a failure is an error before anything is trained."""
    code = f"import sys; open({str(tmp_path / 'made')!r}, 'a').write(sys.argv[1] + ' ')"
    spec = read_spec(write_spec(prepare=f'python -c "{code}" {{seed}}'))
    runner.prepare(spec, plan_runs(spec)[2:])
    assert (tmp_path / "made").read_text() == "2 3 "
    spec = read_spec(write_spec(prepare="python -c 'raise SystemExit(4)'"))
    with pytest.raises(ValueError, match="ended with exit code 4"):
        runner.prepare(spec, plan_runs(spec))


def _compare(*arguments: str) -> tuple[int, str]:
    """Exit code and output; an exception of the command, which `main` turns into an exit code, is raised."""
    result = CliRunner().invoke(app, ["compare", *arguments], catch_exceptions=False)
    return result.exit_code, result.output


def test_report_only_trains_nothing(planned: Planned, write_spec: Callable[..., Path]) -> None:
    """It reports what there is, also of nothing; the files are written."""
    spec, runs = planned
    path = write_spec()
    for run in runs[:2]:
        finish(run, 0.5, 10.0)
    code, text = _compare(str(path), "--report-only")
    assert code == 0
    assert "score, F - D: incomplete: seeds 2, 3 are not finished" in text
    assert {p.name for p in spec.out.iterdir()} >= {"report.html", "comparison.json", "curves.html"}
    assert _states(planned) == ["finished"] * 2 + ["missing"] * 4


def test_failed_runs_are_tried_again_on_request(planned: Planned) -> None:
    """--retry-failed trains them, and only then."""
    _, runs = planned
    record(runs[0], "failed", "program")
    assert [run.name for run in command.unfinished(runs, False)] == [run.name for run in runs[1:]]
    assert command.unfinished(runs, True) == runs


def test_slurm_prints_the_command(
    planned: Planned, write_spec: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line for the unfinished runs, whose configurations are written; the two modes exclude each other."""
    spec, runs = planned
    monkeypatch.setattr(runner, "check_arms", lambda todo: [])
    finish(runs[0], 0.5, 10.0)
    code, text = _compare(str(write_spec()), "--slurm")
    assert (code, text.splitlines()[-1].split()[:2]) == (0, ["sbatch", "--array=2-6"])
    assert [load_config(spec.out / "configs" / f"{n}.yaml").run.name for n in (1, 6)] == ["F-seed1", "D-seed3"]
    with pytest.raises(ValueError, match="exclude each other"):
        _compare(str(write_spec()), "--slurm", "--report-only")


def test_arms_are_checked_before_anything_is_trained(planned: Planned, write_spec: Callable[..., Path]) -> None:
    """A model that does not exist is an error that names the arm; no run is started, nor its directory made."""
    with pytest.raises(ValueError, match=r"arm F: .*base"):
        _compare(str(write_spec()))
    assert not any(run.directory.exists() for run in planned[1])
