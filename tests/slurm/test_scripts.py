"""The batch scripts: what they ask of Slurm, and that Slurm agrees to it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("*.sh"))
RECIPES = [name for name in SCRIPTS if "examples/" in (ROOT / "slurm" / name).read_text()]


def _asked(script: str, option: str) -> str:
    found = re.search(rf"^#SBATCH --{option}=(\S+)$", (ROOT / "slurm" / script).read_text(), re.MULTILINE)
    assert found, f"{script} says nothing of --{option}"
    return found[1]


@pytest.mark.parametrize("script", RECIPES)
def test_time_to_stop_is_asked_for(script: str) -> None:
    """SIGUSR1 goes to the ranks, not to the batch shell, ten minutes ahead; the job may be queued again."""
    assert _asked(script, "signal") == "USR1@600"
    text = (ROOT / "slurm" / script).read_text()
    assert "#SBATCH --requeue\n" in text
    assert "#SBATCH --open-mode=append\n" in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_one_command(script: str) -> None:
    """Below the resources stand the shell's options, the site file and one srun, which pins no number of tasks."""
    lines = (ROOT / "slurm" / script).read_text().replace("\\\n", "").splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands[:2] == ["set -euo pipefail", 'source "${FIPO_SITE:-slurm/site.env}"']
    assert len(commands) == 3
    assert commands[2].startswith("srun --export=ALL ")
    assert not re.search(r"--n(tasks|odes|procs)|\s-[nN]", commands[2])


@pytest.mark.parametrize("variant", ["bare", "container"])
def test_site_file_gives_srun_its_options(variant: str, tmp_path: Path) -> None:
    """As it stands it adds none; with the container's lines switched on, they reach srun as separate words."""
    text = (ROOT / "slurm" / "site.env").read_text()
    if variant == "container":
        text = re.sub(
            r"^# (FIPO_SRUN|    )", r"\1", text.replace("#            --", "           --"), flags=re.MULTILINE
        )
    site = tmp_path / "site.env"
    site.write_text(text)
    command = 'set -euo pipefail; source "$0"; printf "%s\\n" "${FIPO_SRUN[@]}"'
    done = subprocess.run(["bash", "-c", command, site], capture_output=True, text=True, cwd=tmp_path, check=True)
    options = done.stdout.split("\n")[:-1]
    if variant == "bare":
        assert options == [""]  # printf's one line for no argument
        return
    assert options[:2] == [
        f"--container-image={os.environ['HOME']}/megatron_fipo.sqsh",
        f"--container-workdir={tmp_path}",
    ]
    assert all(option.startswith("--") for option in options)


@pytest.mark.slurm
@pytest.mark.parametrize("script", SCRIPTS)
def test_slurm_accepts_the_resources(script: str, cluster: Cluster) -> None:
    """`sbatch --test-only` finds as many nodes of 8 GPUs as the script asks for, on a cluster of 16."""
    nodes = int(_asked(script, "nodes"))
    said = cluster.run("sbatch", "--test-only", f"slurm/{script}").stderr
    assert re.search(r"to start at .* on nodes node", said)
    expected = "node1" if nodes == 1 else f"node[1-{nodes}]"
    assert f"on nodes {expected} in partition batch" in said


@pytest.mark.slurm
def test_slurm_refuses_more_than_there_is(cluster: Cluster) -> None:
    """That acceptance means something: 17 nodes are too many."""
    with pytest.raises(RuntimeError, match="node configuration is not available"):
        cluster.run("sbatch", "--test-only", "--nodes=17", "slurm/fipo_32b.sh")
