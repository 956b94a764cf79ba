"""A shell in a step of an allocation (`srun --pty bash`): which commands there are tasks of a step."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

ASK = """
import os, sys
from pathlib import Path
from megatron_fipo.launch import slurm
mine = os.environ["SLURM_STEP_NUM_TASKS"], slurm.is_interactive(os.environ), slurm.is_task(os.environ)
Path(sys.argv[1] + os.environ["SLURM_PROCID"]).write_text(repr(mine))
"""


def _read(terminal: int, until: str | None = None) -> str:
    """Read a terminal up to these characters, or to the end of the program on it."""
    shown = ""
    while until is None or until not in shown:
        try:
            shown += os.read(terminal, 4096).decode(errors="replace")
        except OSError:  # the shell has ended, and with it the terminal
            break
    return shown


def test_only_what_srun_starts_is_a_task(cluster: Cluster, tmp_path: Path) -> None:
    """A command typed into the shell of a step with 4 tasks is none of them; the tasks of an srun typed there are."""
    (tmp_path / "ask.py").write_text(ASK)
    ask = f"{sys.executable} {tmp_path}/ask.py {tmp_path}"
    controller, terminal = pty.openpty()
    command = [*cluster.inside, "srun", "--nodes=2", "--ntasks=4", "--pty", "bash", "--norc", "-i"]
    environment = {**cluster.environment, "PYTHONPATH": str(ROOT), "PS1": "typed here> "}
    shell = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True
    )
    try:
        os.close(terminal)
        shown = _read(controller, until="typed here> ")  # what is typed before may be lost
        os.write(controller, f"{ask}/typed\nsrun --overlap --ntasks=4 {ask}/step </dev/null\nexit\n".encode())
        shown += _read(controller)
        assert shell.wait(60) == 0, shown
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)  # srun has a child of its own
        shell.wait()
        os.close(controller)
    assert (tmp_path / "typed0").exists(), shown
    assert (tmp_path / "typed0").read_text() == "('4', True, False)"
    assert [(tmp_path / f"step{i}").read_text() for i in range(4)] == ["('4', False, True)"] * 4
