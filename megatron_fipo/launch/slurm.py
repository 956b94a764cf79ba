"""Environment that srun gives its tasks, and how a job requeues itself."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from megatron_fipo.machine.hosts import expand_hosts, step_nodes

_FIRST_PORT, _PORTS = 20_000, 12_000  # below 32768, where Linux starts to give ports to outgoing connections
_INTERACTIVE_STEP, _FIRST_SPECIAL_STEP = "4294967290", 4294967280  # step numbers: salloc's shell, batch scripts, ...
MARKER = "MEGATRON_FIPO_REQUEUE"  # names the file by which the batch script is asked to requeue the job
_ANSWER_SECONDS = 30.0  # a busy controller


def is_task(environment: Mapping[str, str]) -> bool:
    """Return whether srun started this process as one of several tasks."""
    return _is_in_step(environment) and not _is_special(environment) and not is_interactive(environment)


def is_interactive(environment: Mapping[str, str]) -> bool:
    """Return whether this command was typed in a shell of a step, as in `srun --ntasks=8 --pty bash`.

    Such a shell has task 0's variables, but the other tasks' shells have ended at once, and no task is this command.
    Only `--pty` gives a task a terminal. A command typed there has a process group of its own; a task that is this
    command, or a script that runs it, has not.
    """
    if not _is_in_step(environment):
        return False
    if _is_special(environment):
        return environment["SLURM_STEP_ID"] == _INTERACTIVE_STEP
    if environment.get("SLURM_TASK_PID") == str(os.getpid()):
        return False
    session = os.getsid(0)
    is_typed = os.getpgrp() != session or os.getpid() == session
    return is_typed and _has_terminal()


def wrapper_warning(environment: Mapping[str, str]) -> str | None:
    """Return what is wrong where a shell stands between srun and this command; None if none does.

    Slurm signals every process of a step, and a shell that has no handler dies of it, with its job.
    """
    if not _is_in_step(environment) or environment.get("SLURM_TASK_PID") != str(os.getppid()) or _has_terminal():
        return None
    return (
        f"process {os.getppid()}, a shell perhaps, stands between srun and this command and will die of Slurm's signal "
        "before the time limit: start the command with `exec` there"
    )


def interactive_advice(environment: Mapping[str, str], world_size: int) -> str:
    """Return what to tell the user about ranks that are started from a shell of a step."""
    tasks, nodes = _num_tasks(environment), environment.get("SLURM_STEP_NODELIST", "")
    where, ranks = f" on {nodes}" if nodes else "", "rank is" if world_size == 1 else "ranks are"
    return (
        f"this is a shell of an interactive step with {tasks} tasks{where}, of which only the shell is left: "
        f"{world_size} {ranks} started on this node. For a rank in each of {tasks} tasks, type "
        f"`srun --overlap --ntasks={tasks} megatron-fipo ...` here"
    )


def _is_in_step(environment: Mapping[str, str]) -> bool:
    return "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment and _num_tasks(environment) > 1


def _is_special(environment: Mapping[str, str]) -> bool:
    """Return whether the step is one that Slurm makes for a batch script or for salloc's shell; such have one task."""
    return int(environment["SLURM_STEP_ID"]) >= _FIRST_SPECIAL_STEP


def _has_terminal() -> bool:
    """Return whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def torch_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, ... of this task, from srun's variables alone. A MASTER_ADDR or MASTER_PORT that is set wins.

    In a heterogeneous job the ranks are those of the components that srun was told to start.
    """
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(_num_tasks(environment)),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_on_this_node(environment)),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or step_nodes(environment)[0],
        "MASTER_PORT": environment.get("MASTER_PORT") or str(_port(environment)),
    }


def _num_tasks(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or 1)


def _tasks_on_this_node(environment: Mapping[str, str]) -> int:
    """From the step's tasks on each node, which srun writes as `4(x2),3`."""
    tasks: list[int] = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, nodes = part.rstrip(")").partition("(x")
        tasks += [int(count)] * int(nodes or 1)
    return tasks[int(environment["SLURM_NODEID"])]


def _port(environment: Mapping[str, str]) -> int:
    """Return a port, the same on all nodes, and different for jobs of near numbers, a job's steps, and its attempts."""
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return _FIRST_PORT + (64 * job + 8 * (step % 8) + _restarts(environment) % 8) % _PORTS


def _restarts(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_RESTART_COUNT", "0"))


@dataclass(frozen=True)
class Job:
    """The Slurm job that this process is part of.

    Attributes:
        number: Slurm's job ID, which no other job has.
        restarts: restart count; requeues before this attempt.
        step: srun's number for this launch; "" without srun.
        nodes: node list in Slurm's short form.
        array_task: `1234_4` for task 4 of the array 1234, "" for a job outside of an array. Slurm's commands take the
            job ID of an array's last task for the whole array. A job that was submitted by an array's task has this
            variable from there.
    """

    number: str
    restarts: int
    step: str = ""
    nodes: str = ""
    array_task: str = ""
    end: float | None = None
    marker: str = ""

    @property
    def name(self) -> str:
        """Name of this job alone in Slurm's commands."""
        return self.array_task or self.number

    def requeue(self, exclude: Sequence[str] = ()) -> str:
        """Requeue the job, which ends it here; return what came of it: "is requeued", or why it is not.

        Where Slurm cannot be asked, as in most containers, the batch script is told by the marker to do it.

        Args:
            exclude: nodes that the next attempt had better avoid; heeded where enough others are left.
        """
        if shutil.which("scontrol") is None:
            return self._leave_marker() or (
                f"is not requeued: there is no scontrol here: run `scontrol requeue {self.name}` or submit it again"
            )
        found, error = self._record()
        if error or not found:
            reason = error or f"`scontrol show job {self.number}` has no record with this JobId"
            return self._leave_marker() or f"is not requeued: {reason}"
        if against := _reason_against(found):
            return f"is not requeued: {against}"
        array, task = found.get("ArrayJobId"), found.get("ArrayTaskId")
        name = f"{array}_{task}" if task else self.number
        avoided = _nodes_to_exclude(found, exclude)
        if failure := _run("scontrol", "requeue", name)[1]:
            return self._leave_marker() or f"is not requeued: {failure}"
        if not avoided or _run("scontrol", "update", f"JobId={name}", f"ExcNodeList={','.join(avoided)}")[1]:
            return "is requeued"  # Slurm takes the list of a job only once it is pending
        return f"is requeued, without {', '.join(exclude)}"

    def requeue_obstacle(self) -> str | None:
        """Return what would keep `requeue` from working; None if nothing is known of."""
        if self.marker:
            return None
        if shutil.which("scontrol") is None:
            return (
                "there is no scontrol here, and no batch script that does it (slurm/requeue.sh); a container needs one "
                "or the other"
            )
        found, error = self._record()
        if error or not found:
            return error or f"`scontrol show job {self.number}` has no record with this JobId"
        if found.get("BatchFlag", "0") == "0":
            return None  # nothing that was typed by hand is expected to come back
        return "it was submitted without --requeue (Requeue=0)" if found.get("Requeue") == "0" else None

    def current_end(self) -> float | None:
        """Return when Slurm will end the job, in seconds since the epoch; None where it cannot be asked."""
        if shutil.which("scontrol") is None:
            return None
        try:
            return datetime.fromisoformat(self._record()[0].get("EndTime", "")).timestamp()
        except ValueError:
            return None

    def _leave_marker(self) -> str | None:
        """Ask the batch script to requeue the job; None where it does not do so."""
        if not self.marker:
            return None
        try:
            Path(self.marker).touch()
        except OSError as error:
            return f"is not requeued: its batch script cannot be told: {error}"
        return "is requeued by its batch script"

    def _record(self) -> tuple[dict[str, str], str | None]:
        """Return the fields of Slurm's record of this job, and what went wrong if anything did.

        Slurm shows the other tasks of an array and the other components of a heterogeneous job as well.
        """
        fields: dict[str, str] = {}
        error: str | None = None
        for name in dict.fromkeys((self.name, self.number)):
            answer, error = _run("scontrol", "show", "job", name, "--oneliner")
            records = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in answer.splitlines()]
            fields = next((r for r in records if r.get("JobId") == self.number), {})
            if fields:
                break
        return fields, error


def job(environment: Mapping[str, str]) -> Job | None:
    """Return the job that the environment describes; None outside of Slurm."""
    number = environment.get("SLURM_HET_JOB_ID") or environment.get("SLURM_JOB_ID")
    if not number:
        return None
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    end = environment.get("SLURM_JOB_END_TIME", "")
    return Job(
        number,
        _restarts(environment),
        environment.get("SLURM_STEP_ID", ""),
        nodes,
        f"{array}_{task}" if array and task else "",
        end=float(end) if end.isdigit() else None,
        marker=environment.get(MARKER, ""),
    )


def lost_nodes(nodes: str) -> str:
    """Says which of these nodes are down, as far as Slurm knows; nothing where it cannot be asked."""
    if not nodes or shutil.which("scontrol") is None:
        return ""
    states = re.findall(r"NodeName=(\S+).*? State=(\S+)", _run("scontrol", "show", "node", nodes, "--oneliner")[0])
    return ", ".join(f"{name} is {state}" for name, state in states if re.search("DOWN|NOT_RESPONDING|FAIL", state))


def _reason_against(record: Mapping[str, str]) -> str | None:
    """Only a running batch job, or one at its time limit, is requeued: scancel and preemption have their own way."""
    state = "TIMEOUT" if record.get("Reason") == "TimeLimit" else record.get("JobState", "unknown")
    if state not in ("RUNNING", "TIMEOUT"):
        return f"its state is {state}"
    return None if record.get("BatchFlag", "0") != "0" else "it is no batch job"  # counts up with a job's requeues


def _nodes_to_exclude(record: Mapping[str, str], more: Sequence[str]) -> list[str]:
    """Return the job's whole list of nodes to avoid; none where the job would then wait for ever."""
    if not more or record.get("ReqNodeList", "(null)") != "(null)":
        return []
    known = record.get("ExcNodeList", "(null)")
    avoided = list(dict.fromkeys([*(expand_hosts(known) if known != "(null)" else []), *more]))
    shown = _run("scontrol", "show", "partition", record.get("Partition", ""), "--oneliner")[0]
    total, needed = re.search(r"TotalNodes=(\d+)", shown), re.match(r"\d+", record.get("NumNodes", ""))
    if total is None or needed is None or int(needed[0]) + len(avoided) > int(total[1]):
        return []
    return avoided


def _run(*command: str) -> tuple[str, str | None]:
    """Return the command's output, and what went wrong if anything did.

    It is shielded from signals, since Slurm signals every process of a job that it has just requeued.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return "", f"`{' '.join(command)}` did not answer within {_ANSWER_SECONDS:.0f} s"
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if done.returncode:
        return done.stdout, f"`{' '.join(command)}`: {done.stderr.strip() or f'exit code {done.returncode}'}"
    return done.stdout, None
