"""The batch scripts: what they ask of Slurm, and that Slurm agrees to it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_fipo.config import load_config
from megatron_fipo.rollout.vllm import devices
from tests.slurm.cluster import OPEN_FILES, Cluster

ROOT = Path(__file__).parents[2]
SOURCED = "requeue.sh"  # by the batch scripts
SCRIPTS = sorted(path.name for path in (ROOT / "slurm").glob("*.sh") if path.name != SOURCED)
SWEEP = "pp_scaling.sh"  # calls srun itself, for each layout
COMPARISON = "compare.sh"  # names its configuration by the task of an array, see test_arrays.py
RECIPES = [name for name in SCRIPTS if "examples/" in (ROOT / "slurm" / name).read_text()]

PRINTS_ITS_PLACE = r"""#!/bin/bash
printf '{"world": "%s", "rank": "%s", "local": "%s", "node": "%s", ' \
  "$SLURM_NTASKS" "$SLURM_PROCID" "$SLURM_LOCALID" "$(hostname)"
printf '"gpus": "%s", "cores": "%s", "bound": "%s", "files": "%s", "arguments": "%s"}\n' \
  "$CUDA_VISIBLE_DEVICES" "$SLURM_CPUS_PER_TASK" "$(taskset -cp $$ | sed 's/.*: //')" "$(ulimit -Sn)" \
  "$(printf '%s|' "$@")"
"""


def _asked(script: str, option: str) -> str:
    found = re.search(rf"^#SBATCH --{option}=(\S+)$", (ROOT / "slurm" / script).read_text(), re.MULTILINE)
    assert found, f"{script} says nothing of --{option}"
    return found[1]


@pytest.mark.parametrize("script", RECIPES)
def test_tasks_are_the_recipe_s_ranks(script: str) -> None:
    """Nodes x tasks a node = parallel.world_size of the recipe that the script starts."""
    recipe = load_config(ROOT / "examples" / script.replace(".sh", ".yaml"))
    assert int(_asked(script, "nodes")) * int(_asked(script, "ntasks-per-node")) == recipe.parallel.world_size


@pytest.mark.parametrize("script", RECIPES)
def test_time_to_stop_is_asked_for(script: str) -> None:
    """SIGUSR1 goes to the ranks, not to the batch shell, twenty minutes ahead; the job may be queued again."""
    assert _asked(script, "signal") == "USR1@1200"
    text = (ROOT / "slurm" / script).read_text()
    assert "#SBATCH --requeue\n" in text
    assert "#SBATCH --open-mode=append\n" in text


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != SWEEP])
def test_script_is_one_command(script: str) -> None:
    """Below the resources stand the shell's options, the site file and one srun, which pins no number of tasks."""
    lines = (ROOT / "slurm" / script).read_text().replace("\\\n", "").splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    *settings, srun = [command.partition("  #")[0] for command in commands]
    requeue = ["source slurm/requeue.sh"] if "requeue_if_asked" in srun else []
    # Module scripts, which a site file may source, use unset variables: -u comes after them.
    assert settings == ["set -eo pipefail", 'source "${FIPO_SITE:-slurm/site.env}"', *requeue, "set -u"]
    assert bool(requeue) == ("#SBATCH --requeue\n" in (ROOT / "slurm" / script).read_text())
    # Without --cpus-per-task, srun of Slurm 22.05 and newer would give a task one core, whatever the job has.
    assert {"--export=ALL", '--cpus-per-task="$SLURM_CPUS_PER_TASK"'} < set(srun.split())
    assert not re.search(r"--n(tasks|odes|procs)|\s-[nN]", srun)


def test_sweep_passes_srun_its_options(tmp_path: Path) -> None:
    """Each option of the site file comes as one of the sweep's own; the rows' place is FIPO_OUT, or the plan's name."""
    site, command = tmp_path / "site.env", tmp_path / "megatron-fipo"
    command.write_text('#!/bin/bash\nprintf "%s|" "$@"; echo\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "FIPO_SITE": str(site)}
    for out, options, expected in (
        ({}, "", "scaling|sweep|a.yaml|p/best.csv|x.y=1|--out|runs/scaling-best|"),
        ({"FIPO_OUT": "o"}, "-a=b c", "scaling|sweep|a.yaml|p/best.csv|x.y=1|--out|o|--srun=-a=b c|"),
    ):
        site.write_text(f"FIPO_SRUN=({options and chr(34) + options + chr(34)})\n")
        done = subprocess.run(
            ["bash", ROOT / "slurm" / SWEEP, "a.yaml", "p/best.csv", "x.y=1"],
            capture_output=True,
            text=True,
            check=True,
            env=environment | out,
        )
        assert done.stdout.splitlines() == [expected, f"scaling|report|{out.get('FIPO_OUT', 'runs/scaling-best')}|"]


@pytest.mark.parametrize("variant", ["bare", "container"])
def test_site_file_gives_srun_its_options(variant: str, tmp_path: Path) -> None:
    """Unchanged, it adds no arguments; with the container's lines switched on, they reach srun as separate words."""
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
def test_slurm_accepts_the_resources(script: str, each_cluster: Cluster) -> None:
    """`sbatch --test-only` finds as many nodes of 8 GPUs as the script asks for, on a cluster of 16."""
    nodes = int(_asked(script, "nodes"))
    said = each_cluster.run("sbatch", "--test-only", f"slurm/{script}").stderr
    assert re.search(r"to start at .* on nodes node", said)
    expected = "node1" if nodes == 1 else f"node[1-{nodes}]"
    assert f"on nodes {expected} in partition batch" in said


@pytest.mark.slurm
def test_slurm_refuses_more_than_there_is(each_cluster: Cluster) -> None:
    """That acceptance means something: 17 nodes are too many."""
    with pytest.raises(RuntimeError, match="node configuration is not available"):
        each_cluster.run("sbatch", "--test-only", "--nodes=17", "slurm/fipo_32b.sh")


def _command(script: str) -> str:
    if script in RECIPES:
        return f"train|--recipe|examples/{script.removesuffix('.sh')}.yaml"
    return script.removesuffix(".sh")


@pytest.fixture
def ranks(each_cluster: Cluster, tmp_path: Path) -> Callable[..., list[dict[str, str]]]:
    """ranks(script, *arguments, options=()): what each started rank was given, in order, in place of running it."""
    command = tmp_path / "bin" / "megatron-fipo"
    command.parent.mkdir()
    command.write_text(PRINTS_ITS_PLACE)
    command.chmod(0o755)
    site = tmp_path / "site.env"
    site.write_text(f'export PATH="{command.parent}:{each_cluster.environment["PATH"]}"\nFIPO_SRUN=(--label)\n')

    def run(script: str, *arguments: str, options: tuple[str, ...] = ()) -> list[dict[str, str]]:
        job = each_cluster.submit(
            f"slurm/{script}", *arguments, log=tmp_path / f"{script}.log", options=options, FIPO_SITE=str(site)
        )
        assert job.wait()["JobState"] == "COMPLETED", job.output()
        # srun also says that this cluster binds no task to cores.
        lines = [line for line in job.output().splitlines() if ": {" in line]
        found = [json.loads(line.split(": ", 1)[1]) for line in lines]
        return sorted(found, key=lambda rank: int(rank["rank"]))

    return run


@pytest.mark.slurm
@pytest.mark.parametrize("script", [name for name in SCRIPTS if name not in (SWEEP, COMPARISON)])
def test_every_rank_has_its_place(script: str, ranks: Callable[..., list[dict[str, str]]]) -> None:
    """The job has the requested ranks, eight a node, each with its node's GPUs, its cores and the arguments."""
    nodes = int(_asked(script, "nodes"))
    started = ranks(script, "a b.yaml", "run.name=c")
    on_a_node = 1 if script == "convert.sh" else 8
    places = [(rank["world"], rank["rank"], rank["local"], rank["node"]) for rank in started]
    world = nodes * on_a_node
    assert places == [(str(world), str(r), str(r % on_a_node), f"node{r // on_a_node + 1}") for r in range(world)]
    for rank in started:
        assert rank["gpus"] == ("" if script == "convert.sh" else "0,1,2,3,4,5,6,7")
        assert rank["cores"] == _asked(script, "cpus-per-task")
        assert rank["files"] == str(OPEN_FILES)  # which the command has to raise
        assert rank["arguments"] == f"{_command(script)}|a b.yaml|run.name=c|"


@pytest.mark.slurm
@pytest.mark.skipif(os.cpu_count() == 1, reason="nothing to be bound to")
def test_ranks_may_use_all_cores(ranks: Callable[..., list[dict[str, str]]], each_cluster: Cluster) -> None:
    """A recipe's ranks, of which one starts all servers of its node, are not bound to cores; srun's own way binds."""
    everywhere = {rank["bound"] for rank in ranks("fipo_7b.sh", "x.yaml", options=("--nodes=1",))}
    assert everywhere == {_cores(os.sched_getaffinity(0))}
    (bound,) = ranks("convert.sh", "x", options=("--cpus-per-task=1",))
    assert bound["bound"] == "0"


def _cores(numbers: set[int]) -> str:
    """The set as taskset prints it, for cores in a row."""
    return f"{min(numbers)}-{max(numbers)}" if len(numbers) > 2 else ",".join(map(str, sorted(numbers)))


@pytest.mark.slurm
def test_a_gpu_for_each_task(ranks: Callable[..., list[dict[str, str]]]) -> None:
    """Where each task is shown a GPU of its own, the first of a node still knows all of them for its servers."""
    started = ranks("fipo_7b.sh", "x.yaml", options=("--nodes=2", "--gpus-per-task=1"))
    for node in ("node1", "node2"):
        views = [(rank["gpus"],) for rank in started if rank["node"] == node]
        assert views == [(str(index),) for index in range(8)]
        assert devices.share_of(views, 0, tensor_parallel=4) == (tuple("01234567"), 8, True)
        assert not devices.share_of(views, 1, tensor_parallel=4).is_owner


@pytest.mark.slurm
def test_command_line_changes_the_resources(ranks: Callable[..., list[dict[str, str]]]) -> None:
    """`sbatch --nodes=2 --ntasks-per-node=2 --cpus-per-task=3` starts 4 ranks on 2 nodes, the script as it is."""
    started = ranks("fipo_32b.sh", "x.yaml", options=("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=3"))
    assert [(rank["node"], rank["cores"], rank["world"]) for rank in started] == [
        *[("node1", "3", "4")] * 2,
        *[("node2", "3", "4")] * 2,
    ]


@pytest.mark.slurm
def test_variables_arrive_though_sbatch_exports_none(ranks: Callable[..., list[dict[str, str]]]) -> None:
    """With --export=NONE the ranks still have what the site file sets, such as the PATH of the environment."""
    options = ("--nodes=1", "--ntasks-per-node=1", "--export=FIPO_SITE,SLURM_CONF")
    assert len(ranks("fipo_32b.sh", "x.yaml", options=options)) == 1
