"""Ranks that are asked to stop do so in good order."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_fipo import launch
from tests.support.processes import TWO_RANKS, alive, await_pids, command, pids, sleep, stop_when_asked
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.distributed


@contextmanager
def _once_they_run(directory: Path, act: Callable[[], None]) -> Iterator[None]:
    """Inside, `act` is called as soon as two ranks are at work; not any more when the block is left."""
    over = threading.Event()

    def wait() -> None:
        while not over.is_set() and len(pids(directory)) < 2:
            time.sleep(0.05)
        if not over.is_set():
            act()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request(number: signal.Signals, tmp_path: Path) -> None:
    """Slurm's warning, its end of patience and Ctrl-C: the ranks stop where they look, and the record says so."""
    run = tmp_path / "run"
    with (
        _once_they_run(tmp_path, lambda: os.kill(os.getpid(), number)),
        pytest.raises(launch.Interrupted, match=r"^interrupted in step 1: the same command resumes"),
    ):
        launch.run(stop_when_asked, TWO_RANKS, (tmp_path,), run_directory=run)
    events = [json.loads(line)["event"] for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert events == ["start", "signalled", "interrupted"]


def test_ctrl_c_twice(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The first says what a second one does, which ends ranks that do not stop at once."""
    seen = []

    def press_twice() -> None:
        for _ in range(2):
            seen.append([alive(pid) for pid in pids(tmp_path)])
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    with _once_they_run(tmp_path, press_twice), pytest.raises(KeyboardInterrupt):
        launch.run(sleep, TWO_RANKS, (tmp_path,))
    assert seen == [[True, True]] * 2
    assert not any(map(alive, pids(tmp_path)))
    assert capfd.readouterr().err.count("shutting down cleanly; press Ctrl-C again to end at once\n") == 1


def test_nothing_to_save(tmp_path: Path) -> None:
    """Without a run directory, as in a dry run, SIGTERM ends the ranks at once."""
    with _once_they_run(tmp_path, lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(SystemExit, match="143"):
        launch.run(sleep, TWO_RANKS, (tmp_path,))
    assert not any(map(alive, pids(tmp_path)))


@pytest.mark.slow
def test_a_signal_to_every_process(tmp_path: Path) -> None:
    """A signal like Slurm's: the fork server and its like live on, the ranks, which get it twice, stop once, and the
    command's exit code is 75."""
    with command(stop_when_asked, tmp_path) as process:
        await_pids(tmp_path, process)
        everyone = _session(process.pid)
        assert len(everyone) >= 5  # the command, Python's resource tracker, the fork server, two ranks
        for number in (signal.SIGUSR1, signal.SIGTERM):
            for pid in everyone:
                os.kill(pid, number)
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 75


def _session(leader: int) -> list[int]:
    members = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and os.getsid(int(entry.name)) == leader:
                members.append(int(entry.name))
        except ProcessLookupError:
            continue
    return members
