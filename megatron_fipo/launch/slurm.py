"""Slurm: the environment of srun's tasks, and the job, which requeues itself."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from megatron_fipo.machine.command import output_of
from megatron_fipo.machine.hosts import expand_hosts, step_nodes

_FIRST_PORT, _PORTS = 20_000, 12_000  # below 32768, the first port of outgoing connections on Linux
_INTERACTIVE_STEP, _FIRST_SPECIAL_STEP = "4294967290", 4294967280  # step numbers of salloc's shell, batch scripts, ...
MARKER = "MEGATRON_FIPO_REQUEUE"  # path of the marker file that asks the batch script to requeue the job
_TIMEOUT_SECONDS = 30.0  # for a busy controller


def is_task(environment: Mapping[str, str]) -> bool:
    """Return whether srun started this process as one of several tasks."""
    return _is_in_step(environment) and not _is_special(environment) and not is_interactive(environment)


def is_interactive(environment: Mapping[str, str]) -> bool:
    """Return whether this command was typed in a shell of a step, as in `srun --ntasks=8 --pty bash`.

    Such a shell has task 0's variables, but the shells of the other tasks ended at once, and no task is this command.
    Only `--pty` gives a task a terminal. A command typed there has its own process group; a task that is this command,
    or a script that runs it, does not.
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
    """Return a warning if a shell runs between srun and this command; None if not.

    Slurm signals every process of a step, which kills a shell without a handler, and its job.
    """
    if not _is_in_step(environment) or environment.get("SLURM_TASK_PID") != str(os.getppid()) or _has_terminal():
        return None
    return (
        f"process {os.getppid()}, perhaps a shell, runs between srun and this command, and Slurm's signal before the "
        "time limit will kill it: start the command with `exec` there"
    )


def interactive_advice(environment: Mapping[str, str], world_size: int) -> str:
    """Return advice for a user who starts ranks from a shell of a step."""
    tasks, nodes = _num_tasks(environment), environment.get("SLURM_STEP_NODELIST", "")
    where, ranks = f" on {nodes}" if nodes else "", "rank is" if world_size == 1 else "ranks are"
    return (
        f"this is a shell of an interactive step with {tasks} tasks{where}, of which only the shell still runs: "
        f"{world_size} {ranks} started on this node. For a rank in each of {tasks} tasks, type "
        f"`srun --overlap --ntasks={tasks} megatron-fipo ...` here"
    )


def _is_in_step(environment: Mapping[str, str]) -> bool:
    return "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment and _num_tasks(environment) > 1


def _is_special(environment: Mapping[str, str]) -> bool:
    """Return whether the step is Slurm's own, with one task, for a batch script or for salloc's shell."""
    return int(environment["SLURM_STEP_ID"]) >= _FIRST_SPECIAL_STEP


def _has_terminal() -> bool:
    """Return whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def torch_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, ... of this task from srun's variables; MASTER_ADDR and MASTER_PORT are kept if set.

    In a heterogeneous job the ranks are those of the components that srun starts.
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
    """Return the number of the step's tasks on this node; srun writes those of all nodes as `4(x2),3`."""
    tasks: list[int] = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, nodes = part.rstrip(")").partition("(x")
        tasks += [int(count)] * int(nodes or 1)
    return tasks[int(environment["SLURM_NODEID"])]


def _port(environment: Mapping[str, str]) -> int:
    """Return a port, the same on all nodes; jobs with close numbers, steps and attempts of a job get different ones."""
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    return _FIRST_PORT + (64 * job + 8 * (step % 8) + _restarts(environment) % 8) % _PORTS


def _restarts(environment: Mapping[str, str]) -> int:
    return int(environment.get("SLURM_RESTART_COUNT", "0"))


@dataclass(frozen=True)
class Job:
    """Slurm job that this process is part of.

    Attributes:
        number: Slurm's job ID, which is unique.
        restarts: restart count.
        step: srun's number for this launch; "" without srun.
        nodes: node list in Slurm's short form.
        array_task: `1234_4` for task 4 of the array 1234, "" for a job outside of an array. Slurm's commands take the
            job ID of an array's last task for the whole array. A job that an array's task submitted inherits the
            variables of that task.
        end: seconds since the epoch at which Slurm will end the job; None if Slurm did not set it.
        marker: path of the marker file; "" if the batch script does not requeue the job.
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
        """Requeue the job, which ends this process; return "is requeued", or why it is not.

        Without scontrol, as in most containers, the marker file asks the batch script to do it.

        Args:
            exclude: nodes that the next attempt should avoid; used if enough others are left.
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
            return "is requeued"  # Slurm accepts the list only for a pending job
        return f"is requeued, without {', '.join(exclude)}"

    def requeue_obstacle(self) -> str | None:
        """Return why `requeue` could not work; None if no reason is known."""
        if self.marker:
            return None
        if shutil.which("scontrol") is None:
            return (
                "there is no scontrol here, and no batch script that requeues it (slurm/requeue.sh): a container needs "
                "one or the other"
            )
        found, error = self._record()
        if error or not found:
            return error or f"`scontrol show job {self.number}` has no record with this JobId"
        if found.get("BatchFlag", "0") == "0":
            return None  # a command typed by hand is not expected to be requeued
        return "it was submitted without --requeue (Requeue=0)" if found.get("Requeue") == "0" else None

    def current_end(self) -> float | None:
        """Return when Slurm will end the job, in seconds since the epoch; None without an answer of scontrol."""
        if shutil.which("scontrol") is None:
            return None
        try:
            return datetime.fromisoformat(self._record()[0].get("EndTime", "")).timestamp()
        except ValueError:
            return None

    def _leave_marker(self) -> str | None:
        """Ask the batch script to requeue the job; return the result, None if the script does not do so."""
        if not self.marker:
            return None
        try:
            Path(self.marker).touch()
        except OSError as error:
            return f"is not requeued: the marker file for its batch script cannot be written: {error}"
        return "is requeued by its batch script"

    def _record(self) -> tuple[dict[str, str], str | None]:
        """Return the fields of Slurm's record of this job, and the error if there was one.

        Slurm prints the other tasks of an array and the other components of a heterogeneous job as well.
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
    """Return which of these nodes are down, as Slurm knows it; "" if none is, or without scontrol."""
    if not nodes or shutil.which("scontrol") is None:
        return ""
    states = re.findall(r"NodeName=(\S+).*? State=(\S+)", _run("scontrol", "show", "node", nodes, "--oneliner")[0])
    return ", ".join(f"{name} is {state}" for name, state in states if re.search("DOWN|NOT_RESPONDING|FAIL", state))


def _reason_against(record: Mapping[str, str]) -> str | None:
    """Return why the job must not be requeued; None for a running batch job, or one at its time limit.

    A job that was cancelled stays so, and Slurm itself requeues a preempted one.
    """
    state = "TIMEOUT" if record.get("Reason") == "TimeLimit" else record.get("JobState", "unknown")
    if state not in ("RUNNING", "TIMEOUT"):
        return f"its state is {state}"
    return None if record.get("BatchFlag", "0") != "0" else "it is not a batch job"  # grows with requeues


def _nodes_to_exclude(record: Mapping[str, str], more: Sequence[str]) -> list[str]:
    """Return the job's complete list of nodes to avoid; [] if the job could then never start."""
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
    """Return the command's output, and the error if there was one.

    Signals are blocked in it, since Slurm signals every process of a job that it has just requeued.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    try:
        return output_of(command, _TIMEOUT_SECONDS)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
