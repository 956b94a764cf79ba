"""examples/pbs.sh and flux.sh, with programs in place of the launchers: what they start, and when they submit again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A working directory with launchers that note their calls; the run's exit code is in `code`."""
    note = '#!/bin/bash\necho "$(basename "$0") $* MASTER_ADDR=$MASTER_ADDR" >> calls\n'
    programs = {
        "mpiexec": note + 'exit "$(cat code)"\n',
        "qsub": note,
        "flux": (
            '#!/bin/bash\ncase "$1" in\n  getattr) echo 2 ;;\n  hostlist) echo n7 n8 ;;\n'
            '  run) echo "$* MASTER_ADDR=$MASTER_ADDR" >> calls; exit "$(cat code)" ;;\n'
            '  *) echo "$*" >> calls ;;\nesac\n'
        ),
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "nodes").write_text("n7\nn8\n")
    (tmp_path / "site.env").write_text("")
    return tmp_path


def _run(script: str, code: int, site: Path, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    (site / "code").write_text(str(code))
    done = subprocess.run(
        ["bash", EXAMPLES / script, *arguments],
        cwd=site,
        env={"PATH": f"{site}:{os.environ['PATH']}", "FIPO_SITE": str(site / "site.env"), **environment},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return done.returncode, (site / "calls").read_text().splitlines()


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (2, False), (75, True)])
def test_pbs(code: int, again: bool, site: Path) -> None:
    """Ranks know the first node; only a run that was asked to stop is submitted again."""
    pbs = {"PBS_O_WORKDIR": str(site), "PBS_NODEFILE": str(site / "nodes"), "CONFIG": "a.yaml"}
    found, calls = _run("pbs.sh", code, site, **pbs)
    assert found == code
    assert calls[0] == "mpiexec megatron-fipo train a.yaml MASTER_ADDR=n7"
    assert calls[1:] == (["qsub -v CONFIG=a.yaml examples/pbs.sh MASTER_ADDR=n7"] if again else [])


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (75, True)])
def test_flux(code: int, again: bool, site: Path) -> None:
    """The job uses all nodes of the instance, eight tasks each; the same job again after exit code 75."""
    found, (run, *submitted) = _run("flux.sh", code, site, "a.yaml")
    assert found == code
    assert run.startswith("run --nodes=2 --tasks-per-node=8 --gpus-per-node=8 --exclusive --signal=SIGUSR1@20m ")
    assert run.endswith(" megatron-fipo train a.yaml MASTER_ADDR=n7")
    wanted = "--parent batch --nodes=2 --exclusive --time-limit=24h examples/flux.sh a.yaml"
    assert submitted == ([wanted] if again else [])
