"""Training of a comparison's unfinished runs: local commands, several at a time, or an array of Slurm jobs."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from megatron_fipo.comparison.runs import PlannedRun, config_path, state_of
from megatron_fipo.comparison.spec import Spec
from megatron_fipo.exit_codes import BAD_INPUT, RUN_AGAIN, Interrupted

_POLL_SECONDS = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_SCRIPT = "slurm/compare.sh"
_GPUS_PER_NODE = 8  # as the script asks for


def prepare(spec: Spec, runs: Sequence[PlannedRun]) -> None:
    """Run the specification's command for each seed of the runs, each different command once.

    Raises:
        ValueError: it failed.
    """
    commands = dict.fromkeys(spec.prepare.replace("{seed}", str(run.seed)) for run in runs)
    for command in filter(None, commands):
        words = shlex.split(command)
        if words[0] in ("python", "python3"):
            words[0] = sys.executable
        print(f"prepare: {command}", flush=True)
        try:
            # Idle OpenMP threads that spin would take the cores from other processes.
            environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
            code = subprocess.run(words, check=False, env=environment).returncode
        except OSError as error:
            raise ValueError(f"prepare: {words[0]} cannot be started: {error.strerror}") from None
        if code:
            raise ValueError(f"prepare: `{command}` ended with exit code {code}")


def check_arms(runs: Sequence[PlannedRun]) -> list[str]:
    """Check that every arm could be trained, by the first run of each; return the warnings.

    Raises:
        ValueError: what is wrong, by arm.
    """
    from megatron_fipo.checks import check_run

    problems, warnings = [], []
    first: dict[str, PlannedRun] = {}
    for run in runs:
        first.setdefault(run.arm, run)
    for run in first.values():
        try:
            warnings += [f"arm {run.arm}: {text}" for text in check_run(run.config, needs_gpu=False)]
        except ValueError as error:
            problems.append(f"arm {run.arm}: {error}")
    if problems:
        raise ValueError("\n".join(problems))
    return warnings


@dataclass
class _Process:
    run: PlannedRun
    process: subprocess.Popen[bytes]
    log: BinaryIO
    started: float = field(default_factory=time.monotonic)


def train_all(spec: Spec, runs: Sequence[PlannedRun], jobs: int, say: Callable[[str], None]) -> None:
    """Train runs, `jobs` at a time. A failed run is counted, and the others go on.

    Raises:
        Interrupted: this process was asked to stop, or a run was; all have ended, and the same command continues.
        ValueError: `train` rejected its input.
    """
    waiting, running, rejected = list(runs), list[_Process](), list[str]()
    (spec.out / "logs").mkdir(parents=True, exist_ok=True)
    stop = False
    with _signals() as received:
        try:
            while running or (waiting and not stop):
                while waiting and len(running) < jobs and not stop and not received:
                    running.append(_start(spec, waiting.pop(0)))
                    say(f"{running[-1].run.name}: started, {len(waiting)} waiting; log: {running[-1].log.name}")
                while received:
                    stop = True
                    _send(running, received.pop(0))
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    stop = not _is_over(one, say, rejected) or stop
                time.sleep(_POLL_SECONDS)
        finally:
            _send(running, signal.SIGTERM)  # after an error of this loop
            for one in running:
                one.process.wait()
                one.log.close()
    if rejected:
        raise ValueError("\n".join(rejected))
    if any(state_of(run).status in ("unfinished", "missing") for run in runs):
        raise Interrupted("the comparison is not complete; the same command continues")


def _start(spec: Spec, run: PlannedRun) -> _Process:
    log = (spec.out / "logs" / f"{run.name}.log").open("ab")
    command = train_command(config_path(spec, run))
    # In a process group of its own: Ctrl-C comes to this process, which passes it on once.
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
    return _Process(run, process, log)


def train_command(config: Path) -> list[str]:
    """Return the command that trains one run."""
    return [sys.executable, "-m", "megatron_fipo.cli", "train", str(config)]


def _send(running: Sequence[_Process], number: int) -> None:
    for one in running:
        one.process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)


def _is_over(one: _Process, say: Callable[[str], None], rejected: list[str]) -> bool:
    """Report how a run ended; return whether it needs no further attempt. Otherwise no other run is started."""
    one.log.close()
    code, minutes = one.process.returncode, (time.monotonic() - one.started) / 60
    state = state_of(one.run)
    say(f"{one.run.name}: {state.status} after {minutes:.1f} minutes" + (f": {state.cause}" if state.cause else ""))
    if code == BAD_INPUT or (state.status == "missing" and code not in (0, RUN_AGAIN)):
        rejected.append(f"{one.run.name} could not be trained: {_last_lines(Path(one.log.name))}")
    return state.status in ("finished", "failed")


def _last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    start = max((n for n, line in enumerate(lines) if line.startswith("error: ")), default=max(0, len(lines) - 5))
    return "\n".join(lines[start:])


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals that ask this process to stop, for the runs."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, receive) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            with contextlib.suppress(TypeError):  # a handler that Python did not install
                signal.signal(number, handler)


def array_command(spec: Spec, runs: Sequence[PlannedRun]) -> str:
    """Return the `sbatch` command of an array with one task per run.

    Raises:
        ValueError: the runs have different numbers of ranks, which one array cannot have.
    """
    ranks = sorted({run.config.parallel.world_size for run in runs})
    if len(ranks) > 1:
        raise ValueError(
            f"parallel.world_size differs between arms: {', '.join(map(str, ranks))}; an array's tasks are of one size"
        )
    per_node = _tasks_per_node(ranks[0])
    sizes = [f"--nodes={ranks[0] // per_node}", f"--ntasks-per-node={per_node}", f"--gpus-per-node={per_node}"]
    words = ["sbatch", f"--array={_ranges([run.number for run in runs])}", *sizes, _SCRIPT, str(spec.out / "configs")]
    return shlex.join(words)


def _tasks_per_node(ranks: int) -> int:
    return next(tasks for tasks in range(min(ranks, _GPUS_PER_NODE), 0, -1) if ranks % tasks == 0)


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers as Slurm writes them: 1-4,7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
