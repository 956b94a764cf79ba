"""The emulated cluster itself goes when its owner goes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import ROOT, obstacle
from tests.support.waiting import wait_until

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
        wait_until(lambda: any("sleep" in p.name() for p in _processes_of(directory)), lambda: "the job does not run")
    finally:
        owner.send_signal(number)
        owner.wait()
    wait_until(lambda: not _processes_of(directory), lambda: "a process is left")
    wait_until(lambda: not Path(directory).exists(), lambda: "a file is left")
