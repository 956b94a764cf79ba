"""A function that is called in a process of its own: what it returns and raises, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_fipo.atomic_file import write_atomically
from megatron_fipo.launch import processes
from tests.support.processes import ROOT, alive, await_pids
from tests.support.waiting import wait_until

# A shell starts what is in the background with SIGINT ignored, and so this test's parent too.
PARENT = """
import signal
import sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)
from megatron_fipo.launch import processes
from tests.launch.test_processes import _note_and_sleep
processes.call(_note_and_sleep, Path(sys.argv[1]))
"""


def _facts(number: int, *, text: str) -> tuple[int, str, int, int, set[int]]:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return number + 1, text, os.getpid(), os.getpgid(0), {int(s) for s in blocked} & set(processes.SIGNALS)


def test_result() -> None:
    """It comes back; the process leads a group of its own and receives signals."""
    number, text, pid, group, blocked = processes.call(_facts, 1, text="a")
    assert (number, text, blocked) == (2, "a", set())
    assert pid == group != os.getpid()
    assert not alive(pid)


def _refuse() -> None:
    raise ValueError("lr=-1 must be positive")


def _fail() -> None:
    raise KeyError("weights")


def _be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_errors() -> None:
    """A ValueError is the caller's; anything else shows where it was raised; so does the end of the process."""
    with pytest.raises(ValueError, match=r"^lr=-1 must be positive$"):
        processes.call(_refuse)
    with pytest.raises(RuntimeError, match=r"(?s)^_fail failed:.*in _fail.*KeyError: 'weights'"):
        processes.call(_fail)
    with pytest.raises(RuntimeError, match=r"^the process of _be_killed ended with exit code -9$"):
        processes.call(_be_killed)


def _note_and_sleep(directory: Path) -> None:
    child = subprocess.Popen(["sleep", "600"])
    for number, pid in enumerate((os.getpid(), child.pid)):
        write_atomically(directory / f"{number}.pid", str(pid))
    time.sleep(600)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_it_ends_with_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    """With all that it started, on Ctrl-C and when the parent is killed outright. (Imports everything anew: slow.)"""
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        try:
            started = await_pids(tmp_path, parent)
            assert all(map(alive, started))
            parent.send_signal(number)
            wait_until(lambda: not any(map(alive, started)))
        finally:
            parent.kill()
