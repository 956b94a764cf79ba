"""Facts of a task from srun's variables."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from megatron_fipo.launch import slurm

TASK = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "12",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[08-10],login",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3,1",
}


def test_srun_variables_become_torch_s() -> None:
    """Rank, world, local rank, the tasks on this node of the step's `4(x2),3,1`, and the first node's name."""
    found = slurm.torch_environment(TASK)
    assert {k: v for k, v in found.items() if k != "MASTER_PORT"} == {
        "RANK": "5",
        "WORLD_SIZE": "12",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu08",
    }


@pytest.mark.parametrize(("node", "tasks"), [("0", "4"), ("1", "4"), ("2", "3"), ("3", "1")])
def test_tasks_on_each_node(node: str, tasks: str) -> None:
    """Nodes of a step may run different numbers of tasks."""
    assert slurm.torch_environment({**TASK, "SLURM_NODEID": node})["LOCAL_WORLD_SIZE"] == tasks


@pytest.mark.parametrize(
    ("text", "node", "tasks"),
    [("8(x16)", "0", "8"), ("8(x16)", "15", "8"), ("8", "0", "8"), ("3,8(x15)", "0", "3"), ("3,8(x15)", "15", "8")],
)
def test_tasks_per_node(text: str, node: str, tasks: str) -> None:
    """One number for all nodes, or the first node's own."""
    environment = {**TASK, "SLURM_STEP_TASKS_PER_NODE": text, "SLURM_NODEID": node}
    assert slurm.torch_environment(environment)["LOCAL_WORLD_SIZE"] == tasks


def test_an_address_that_is_set_wins() -> None:
    """MASTER_ADDR and MASTER_PORT of the environment are used as they are."""
    found = slurm.torch_environment({**TASK, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.7", "1234")


def test_ports_differ() -> None:
    """Between a hundred jobs in a row, the first 8 steps of a job and its first 8 attempts; always below the ports that
    Linux gives to outgoing connections."""
    ports = [
        int(slurm.torch_environment({**TASK, **variables})["MASTER_PORT"])
        for job in range(3_999_950, 4_000_050)
        for step in range(8)
        for restart in range(8)
        for variables in [{"SLURM_JOB_ID": f"{job}", "SLURM_STEP_ID": f"{step}", "SLURM_RESTART_COUNT": f"{restart}"}]
    ]
    assert len(set(ports)) == len(ports) == 6400
    assert (min(ports) >= 20_000, max(ports) < 32_768) == (True, True)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login", ["login"]),
        ("a,b-2,c.example", ["a", "b-2", "c.example"]),
        ("gpu[08-10]", ["gpu08", "gpu09", "gpu10"]),
        ("gpu[9,11-12],n[1,3]x", ["gpu9", "gpu11", "gpu12", "n1x", "n3x"]),
        ("rack[0-1]n[01-02]", ["rack0n01", "rack0n02", "rack1n01", "rack1n02"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("linux[1,2]", ["linux1", "linux2"]),
        ("b04-[09-10]", ["b04-09", "b04-10"]),
        ("a-[1-2]-[3,5],c", ["a-1-3", "a-1-5", "a-2-3", "a-2-5", "c"]),
    ],
)
def test_node_lists(text: str, hosts: list[str]) -> None:
    """Slurm's short form written out: ranges, zero padding, several brackets, plain names."""
    assert slurm.expand_hosts(text) == hosts


@pytest.mark.parametrize(
    ("environment", "is_task"),
    [
        (TASK, True),
        ({}, False),
        ({**TASK, "SLURM_STEP_NUM_TASKS": "1"}, False),  # srun -n 1: this command starts the ranks
        ({k: v for k, v in TASK.items() if k != "SLURM_STEP_ID"}, False),  # the batch script itself
        ({**TASK, "SLURM_STEP_ID": "4294967291"}, False),  # it, where it has Slurm's number for batch scripts
        ({**TASK, "SLURM_STEP_ID": "4294967290"}, False),  # salloc's shell, with or without a terminal
        ({k: v for k, v in TASK.items() if not k.endswith(("NTASKS", "NUM_TASKS"))}, False),
    ],
)
def test_one_of_several_tasks(environment: dict[str, str], is_task: bool) -> None:
    """Only then is this process given a rank by srun."""
    assert slurm.is_task(environment) is is_task


# Array tasks, components of heterogeneous jobs


ARRAY = {"SLURM_JOB_ID": "1234", "SLURM_ARRAY_JOB_ID": "1234", "SLURM_ARRAY_TASK_ID": "4"}
FOUR = "JobId=1234 ArrayJobId=1234 ArrayTaskId=4 JobState=RUNNING Reason=None BatchFlag=1"
TWO = "JobId=1236 ArrayJobId=1234 ArrayTaskId=2 JobState=COMPLETED Reason=None BatchFlag=1"


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with `scontrol` on the PATH: `show job NAME` prints the file NAME there, or fails as Slurm does."""
    script = tmp_path / "scontrol"
    script.write_text(
        # Slurm signals every process of a job that was just requeued.
        f'#!/bin/sh\ncd {tmp_path}\n[ "$1" = update ] && kill -TERM $$\necho "$1 $3$2" >> calls\n'
        '[ "$1" = show ] || exit 0\n'
        '[ "$2" = partition ] && { echo "PartitionName=$3 TotalNodes=4 "; exit 0; }\n'
        '[ -e "$3" ] || { echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; }\nwhile read -r l; do '
        'echo "$l"; done < "$3"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def _requeue(environment: dict[str, str], directory: Path, *exclude: str) -> tuple[str | None, list[str]]:
    """Why not, and what was asked of Slurm."""
    job = slurm.job(environment)
    assert job is not None
    came_of_it = job.requeue(exclude)
    reason = None if came_of_it == "is requeued" else came_of_it.removeprefix("is not requeued: ")
    return reason, (directory / "calls").read_text().splitlines()


def test_only_the_array_s_own_task_is_requeued(scontrol: Path) -> None:
    """Slurm takes an array's job ID, which is also that of one of its tasks, for the whole array."""
    (scontrol / "1234").write_text(f"{FOUR}\n{TWO}\n")
    (scontrol / "1234_4").write_text(f"{FOUR}\n")
    assert _requeue(ARRAY, scontrol) == (None, ["show 1234_4job", "requeue 1234_4"])


@pytest.mark.parametrize("lines", [(FOUR, TWO), (TWO, FOUR)])
def test_the_state_is_the_own_task_s(lines: tuple[str, str], scontrol: Path) -> None:
    """Whatever order Slurm shows tasks in, and where it shows all of them for one."""
    (scontrol / "1234_4").write_text("\n".join(lines) + "\n")
    assert _requeue(ARRAY, scontrol)[0] is None
    (scontrol / "1234_4").write_text(
        "\n".join(lines).replace("RUNNING", "CANCELLED").replace("COMPLETED", "RUNNING") + "\n"
    )
    assert _requeue(ARRAY, scontrol)[0] == "its state is CANCELLED"


def test_a_task_with_a_job_id_of_its_own(scontrol: Path) -> None:
    """All tasks but an array's last have one."""
    (scontrol / "1234_2").write_text(TWO.replace("COMPLETED", "RUNNING") + "\n")
    environment = {**ARRAY, "SLURM_JOB_ID": "1236", "SLURM_ARRAY_TASK_ID": "2"}
    assert _requeue(environment, scontrol) == (None, ["show 1234_2job", "requeue 1234_2"])


@pytest.mark.parametrize("parent_is_known", [True, False])
def test_a_job_that_an_array_s_task_submitted(parent_is_known: bool, scontrol: Path) -> None:
    """It inherits the array's variables, and is requeued itself, not that task."""
    if parent_is_known:
        (scontrol / "1234_4").write_text(f"{FOUR}\n")
    (scontrol / "1300").write_text("JobId=1300 JobState=RUNNING Reason=None BatchFlag=1\n")
    calls = ["show 1234_4job", "show 1300job", "requeue 1300"]
    assert _requeue({**ARRAY, "SLURM_JOB_ID": "1300"}, scontrol) == (None, calls)


def test_a_heterogeneous_job(scontrol: Path) -> None:
    """Slurm shows all components; the first one stands for the job."""
    component = "HetJobId=7 JobState=RUNNING Reason=None BatchFlag"
    (scontrol / "7").write_text(f"JobId=7 {component}=1\nJobId=8 {component}=0\n")
    environment = {"SLURM_JOB_ID": "8", "SLURM_HET_JOB_ID": "7"}
    assert _requeue(environment, scontrol) == (None, ["show 7job", "requeue 7"])


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("JobState=RUNNING Reason=None BatchFlag=2", None),  # requeued by Slurm after a failure before
        ("JobState=RUNNING Reason=None BatchFlag=0", "it is not a batch job"),
        ("JobState=COMPLETING Reason=TimeLimit BatchFlag=1", None),
        ("JobState=PREEMPTED Reason=None BatchFlag=1", "its state is PREEMPTED"),
    ],
)
def test_which_jobs_are_requeued(record: str, reason: str | None, scontrol: Path) -> None:
    (scontrol / "9").write_text(f"JobId=9 {record}\n")
    assert _requeue({"SLURM_JOB_ID": "9"}, scontrol)[0] == reason


def test_a_job_that_slurm_does_not_know(scontrol: Path) -> None:
    reason, calls = _requeue({"SLURM_JOB_ID": "9"}, scontrol)
    assert "Invalid job id specified" in str(reason)
    assert calls == ["show 9job"]


@pytest.mark.parametrize(
    ("record", "updated"),
    [
        ("ExcNodeList=(null) ReqNodeList=(null) NumNodes=2", "ExcNodeList=n7JobId=9"),
        ("ExcNodeList=a[1-2] ReqNodeList=(null) NumNodes=1", "ExcNodeList=a1,a2,n7JobId=9"),
        ("ExcNodeList=a[1-2] ReqNodeList=(null) NumNodes=2", None),  # the partition has 4 nodes: the job would wait
        ("ExcNodeList=(null) ReqNodeList=n7 NumNodes=2", None),
    ],
)
def test_a_node_to_avoid(record: str, updated: str | None, scontrol: Path) -> None:
    """It is added to those that the user avoids, once the job is pending, as long as enough nodes are left."""
    (scontrol / "9").write_text(f"JobId=9 JobState=RUNNING Reason=None BatchFlag=1 Partition=p {record}\n")
    came_of_it, calls = _requeue({"SLURM_JOB_ID": "9"}, scontrol, "n7")
    assert came_of_it == ("is requeued, without n7" if updated else None)
    assert [call for call in calls if not call.startswith("show")] == [
        *("requeue 9", *([f"update {updated}"] if updated else [])),
    ]


def test_a_container_leaves_a_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without scontrol the batch script is asked to requeue the job; if it does not do so, a person is."""
    monkeypatch.setenv("PATH", str(tmp_path))
    marker = tmp_path / "marker"
    job = slurm.job({"SLURM_JOB_ID": "9", "MEGATRON_FIPO_REQUEUE": str(marker)})
    assert job is not None
    assert job.requeue_obstacle() is None
    assert (job.requeue(), marker.exists()) == ("is requeued by its batch script", True)
    alone = slurm.Job("9", 0)
    assert "there is no scontrol here, and no batch script that requeues it" in str(alone.requeue_obstacle())
    assert alone.requeue().startswith("is not requeued: there is no scontrol here: run `scontrol requeue 9`")


@pytest.mark.parametrize(
    ("record", "obstacle"),
    [
        ("BatchFlag=1 Requeue=1", None),
        ("BatchFlag=2 Requeue=1", None),
        ("BatchFlag=1 Requeue=0", "it was submitted without --requeue (Requeue=0)"),
        ("BatchFlag=0 Requeue=0", None),  # typed into salloc's shell
    ],
)
def test_what_would_keep_a_job_from_being_requeued(record: str, obstacle: str | None, scontrol: Path) -> None:
    """It is known at the start."""
    (scontrol / "9").write_text(f"JobId=9 JobState=RUNNING Reason=None {record}\n")
    assert slurm.Job("9", 0).requeue_obstacle() == obstacle


def test_the_end_of_a_job(scontrol: Path) -> None:
    """From the environment; asked for again, it is Slurm's newest word."""
    job = slurm.job({"SLURM_JOB_ID": "9", "SLURM_JOB_END_TIME": "1700000000"})
    assert job is not None
    assert (job.end, job.current_end()) == (1_700_000_000.0, None)
    (scontrol / "9").write_text("JobId=9 EndTime=2026-11-28T12:00:00 JobState=RUNNING\n")
    assert job.current_end() == datetime.fromisoformat("2026-11-28T12:00:00").timestamp()


REQUEUE = Path(__file__).parents[2] / "slurm" / "requeue.sh"


@pytest.mark.parametrize(
    ("record", "asked", "calls"),
    [
        ("JobId=1234 ArrayTaskId=4 JobState=RUNNING Reason=None", True, ["show 1234_4job", "requeue 1234_4"]),
        ("JobId=1234 JobState=COMPLETING Reason=TimeLimit BatchFlag=1", True, ["show 1234_4job", "requeue 1234_4"]),
        ("JobId=1234 JobState=CANCELLED Reason=None BatchFlag=1", True, ["show 1234_4job"]),
        ("JobId=1234 JobState=RUNNING Reason=None", False, []),
    ],
)
def test_the_batch_script_requeues(record: str, asked: bool, calls: list[str], scontrol: Path) -> None:
    """On the host after srun, if the ranks asked for it and the job was not cancelled; the exit code is srun's."""
    (scontrol / "1234_4").write_text(f"{record} BatchFlag=1\n")
    step = 'touch "$MEGATRON_FIPO_REQUEUE"; ' if asked else ""
    script = f"set -euo pipefail; source {REQUEUE}; bash -c '{step}exit 75' || requeue_if_asked $?; echo \"went on\""
    environment = {**ARRAY, "PATH": f"{scontrol}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", script], cwd=scontrol, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "")
    called = scontrol / "calls"
    assert (called.read_text().splitlines() if called.exists() else []) == calls
    assert list(scontrol.glob(".requeue*")) == []


@pytest.mark.parametrize(
    ("says", "environment", "told"),
    [
        ("2026-11-28T12:00:00", "", str(int(datetime(2026, 11, 28, 12).timestamp()))),
        ("2026-11-28T12:00:00", "5", "5"),
        ("N/A", "", "none"),
        ("", "", "none"),
    ],
)
def test_the_batch_script_tells_the_job_s_end(says: str, environment: str, told: str, scontrol: Path) -> None:
    """To ranks in containers, where Slurm itself does not: what squeue says, if that is a time."""
    (scontrol / "squeue").write_text(f"#!/bin/sh\necho {says}\n")
    (scontrol / "squeue").chmod(0o755)
    script = f"set -euo pipefail; source {REQUEUE}; set -u; bash -c 'echo \"${{SLURM_JOB_END_TIME:-none}}\"'"
    variables = {"PATH": f"{scontrol}:/usr/bin:/bin", **({"SLURM_JOB_END_TIME": environment} if environment else {})}
    done = subprocess.run(["bash", "-c", script], cwd=scontrol, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{told}\n", "")


def test_two_jobs_of_an_array_are_two() -> None:
    """Records of attempts are told apart by the job ID, which a job that inherits the array's variables has not."""
    jobs = [slurm.job({**ARRAY, "SLURM_JOB_ID": number}) for number in ("1234", "1300")]
    assert [job and job.number for job in jobs] == ["1234", "1300"]


# A shell of a step


def _asked_in(environment: dict[str, str], terminal: bool, typed: bool) -> bool:
    """Whether a process calls itself a task of a step.

    With a terminal it is, if `typed`, a command of a shell with job control, otherwise the terminal's first process.
    """
    code = "import os; from megatron_fipo.launch import slurm; print('IS', slurm.is_task(os.environ))"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, **environment}
    if not terminal:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, start_new_session=True)
        return "IS True" in done.stdout
    shell = (
        ["bash", "-ic", '"$@"', "bash", *command] if typed else ["bash", "-c", 'SLURM_TASK_PID=$$ exec "$@"', "bash"]
    )
    output = bytearray()

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 1024)
        output.extend(data)
        return data

    child, descriptor = pty.fork()
    if child == 0:
        os.execvpe("bash", shell if typed else [*shell, *command], environment)
    try:
        while read(descriptor):
            pass
    except OSError:  # the last process has closed the terminal
        pass
    os.close(descriptor)
    os.waitpid(child, 0)
    assert b"IS " in output, output
    return b"IS True" in output


STEP = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PTY_PORT": "42225"}


@pytest.mark.parametrize(
    ("environment", "terminal", "typed", "is_task"),
    [
        (STEP, True, True, False),  # srun --ntasks=8 --pty bash, then the command
        ({**STEP, "SLURM_STEP_ID": "4294967290"}, True, True, False),  # the shell that salloc starts
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, True, True, False),
        (STEP, True, False, True),  # srun --ntasks=8 --pty megatron-fipo: a task as any other
        (STEP, False, False, True),  # srun in such a shell: its tasks inherit SLURM_PTY_PORT, and no terminal
    ],
)
def test_a_command_in_a_step_s_shell(environment: dict[str, str], terminal: bool, typed: bool, is_task: bool) -> None:
    """It is none of the step's tasks, though it has the variables of the first."""
    assert _asked_in(environment, terminal, typed) is is_task


@pytest.mark.parametrize(("parent", "warns"), [(os.getppid(), True), (1, False)])
def test_a_shell_between_srun_and_this_command(parent: int, warns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would die of Slurm's signal; in a shell that somebody types into, nothing is wrong."""
    monkeypatch.setattr(slurm, "_has_terminal", lambda: False)
    environment = {**STEP, "SLURM_TASK_PID": str(parent)}
    warning = slurm.wrapper_warning(environment)
    assert (warning is not None and "start the command with `exec`" in warning) is warns
    assert slurm.wrapper_warning({"SLURM_TASK_PID": str(parent)}) is None


def test_advice_in_a_step_s_shell() -> None:
    """It says what is started, and how to start a rank in each task."""
    advice = slurm.interactive_advice({**STEP, "SLURM_STEP_NODELIST": "gpu[1-2]"}, 4)
    assert "a shell of an interactive step with 8 tasks on gpu[1-2]" in advice
    assert "4 ranks are started on this node" in advice
    assert "srun --overlap --ntasks=8 megatron-fipo" in advice
