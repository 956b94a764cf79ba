"""The emulated cluster itself goes when its owner goes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import ROOT, obstacle

pytestmark = pytest.mark.slurm

# Brings a cluster up with a job on it, says where it is, and waits to be killed.
OWNER = """
import time
from tests.slurm.cluster import Cluster
cluster = Cluster(2)
cluster.run("sbatch", "--output=/dev/null", "--wrap=srun sleep 600")
print(cluster.directory, flush=True)
time.sleep(600)
"""


def _wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} within {seconds} s"
        time.sleep(0.1)


def _processes_of(directory: str) -> list[psutil.Process]:
    """All that have the cluster's directory in their command line or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(directory in text for text in (*process.cmdline(), *process.environ().values())):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_its_owner(number: signal.Signals) -> None:
    """Daemons, a running job and files are gone within seconds after whoever made the cluster was killed."""
    if obstacle():
        pytest.skip(f"NO SLURM: {obstacle()}")
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert owner.stdout is not None
        directory = owner.stdout.readline().strip()
        _wait_until(lambda: any("sleep" in p.name() for p in _processes_of(directory)), 20.0, "the job runs")
    finally:
        owner.send_signal(number)
        owner.wait()
    _wait_until(lambda: not _processes_of(directory), 10.0, "no process is left")
    _wait_until(lambda: not Path(directory).exists(), 10.0, "no file is left")
