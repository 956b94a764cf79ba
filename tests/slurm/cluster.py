"""A real Slurm on this machine: munged, slurmctld, and one slurmd a node.

Every node has a host name, a network address and processes of its own, and can lose its power. Nodes say that they
have 8 GPUs and 96 cores, so that batch scripts run as they are. The cluster is as unkind as others are: nodes resolve
their own name to 127.0.1.1, jobs inherit a soft limit of 1024 open files, and a task is bound to its cores.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.waiting import PATIENCE

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
GPUS, CORES, MEGABYTES = 8, 96, 1_000_000
NODES = 16
NETWORK, CONTROLLER = "10.77.0", "10.77.0.254"
OPEN_FILES = 1024  # the soft limit of whoever submits a job, which the job's tasks inherit
COMMAND_SECONDS = 120  # for one call of a Slurm command
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL")

# cred_expire: a requeued job waits that long, 120 s by default. MinJobAge: ended jobs can be asked for their state.
# SlurmdTimeout: a node that does not answer for that long is down, which is found out after a few MessageTimeouts.
# Jobs in `preemptible` give way to those in `batch`.
SLURM_CONF = """
ClusterName=emulated
SlurmctldHost={host}({controller})
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge/socket/s,cred_expire=5
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0,nohold_on_prolog_fail
Prolog={directory}/etc/prolog
ReturnToService=2
RebootProgram=/bin/true
SlurmdTimeout={timeout}
MessageTimeout=5
KillWait=5
Waittime=0
MinJobAge=3600
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/run/slurmctld.pid
SlurmdPidFile={directory}/run/%n.pid
SlurmctldLogFile={directory}/log/slurmctld.log
SlurmdLogFile={directory}/log/%n.log
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
PropagateResourceLimitsExcept=MEMLOCK
PlugStackConfig={directory}/etc/plugstack.conf
{plugins}
MailProg=/bin/true
GresTypes=gpu
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=batch Nodes=ALL Default=YES OverSubscribe=EXCLUSIVE PriorityTier=2 PreemptMode=OFF
PartitionName=preemptible Nodes=ALL OverSubscribe=EXCLUSIVE PriorityTier=1 GraceTime=300
"""
NODE = (
    "NodeName={name} NodeAddr={address} State=UNKNOWN "
    f"Sockets=2 CoresPerSocket={CORES // 2} ThreadsPerCore=1 RealMemory={MEGABYTES} Gres=gpu:h100:{GPUS}"
)
# A GPU that has no device behind it would not be counted.
GRES_CONF = "AutoDetect=off\nName=gpu Type=h100 File={directory}/dev/nvidia[0-7]\n"
# No cgroup is used, and none may be mounted. Slurm 22.05 cannot say so otherwise, newer ones have a word for it.
CGROUP_CONF, NEWER_CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n", "CgroupPlugin=disabled\n"
# Of a node that is given a job.
PROLOG = "#!/bin/sh\nif rm {directory}/etc/refuses.$SLURM_JOB_ID 2>/dev/null; then exit 1; fi\n"
NEWER = ROOT / "build" / "newer-slurm"  # where install.sh puts a second, newer Slurm


def obstacle(newer: bool = False) -> str | None:
    """Why no cluster, or none of the newer Slurm, can run on this machine; None: it can."""
    commands = ("munged", "slurmctld", "slurmd", "sbatch", "unshare", "nsenter", "ip")
    missing = [name for name in commands if not shutil.which(name, path=PATH)]
    if newer and not (NEWER / "complete").exists():
        missing.append(str(NEWER))
    if missing:
        return f"{', '.join(missing)} not found: run tests/slurm/install.sh"
    script = "ip link add name switch type bridge && ip link add name a type veth peer name b"
    command = [*_namespaces(), "unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "sh", "-c", script]
    refused = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_SECONDS, env={**os.environ, "PATH": PATH}
    )
    return f"namespaces are not permitted here: {refused.stderr.strip()}" if refused.returncode else None


def _namespaces() -> list[str]:
    user = [] if os.getuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    return ["unshare", *user, "--net"]


class Cluster:
    """A running cluster; a context manager. Its processes end with it, or with the process that made it.

    `inside` before a command runs that command in the cluster's network.
    """

    def __init__(self, num_nodes: int = NODES, newer: bool = False) -> None:
        """Start it and wait until all nodes are idle; `newer`: of the Slurm in NEWER, not the system's.

        Raises:
            RuntimeError: it does not come up; with the last lines of the daemons' logs.
        """
        self.newer = newer
        self.nodes = [f"node{i}" for i in range(1, num_nodes + 1)]
        self.directory = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: it holds a socket
        path = f"{NEWER}/usr/bin:{NEWER}/usr/sbin:{PATH}" if newer else PATH
        self.environment = {**os.environ, "PATH": path, "SLURM_CONF": str(self.directory / "etc" / "slurm.conf")}
        _write_files(self.directory, self.nodes, newer)
        self._keeper = subprocess.Popen(
            [*_namespaces(), "bash", HERE / "cluster.sh", self.directory, "up", *self.nodes],
            stdin=subprocess.PIPE,
            env=self.environment,
            text=True,
            start_new_session=True,  # Ctrl-C is for the tests, which then stop the cluster
        )
        user = [] if os.getuid() == 0 else ["--user", "--preserve-credentials"]
        self.inside = ["nsenter", f"--target={self._keeper.pid}", *user, "--net"]
        try:
            self.wait_for(self.nodes, ("idle",), 30.0)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End all processes and remove the directory."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait(COMMAND_SECONDS)

    def run(self, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """A Slurm command, in the project's root and in the cluster's network.

        Raises:
            RuntimeError: it failed; the message is its standard error, or its exit code where that is empty.
        """
        done = subprocess.run(
            [*self.inside, *map(str, command)],
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            cwd=ROOT,
        )
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
        return done

    def submit(
        self, script: str, *arguments: object, log: Path, options: Sequence[str] = (), **environment: str
    ) -> Job:
        """`sbatch OPTIONS SCRIPT ARGUMENTS`, with these variables; the job's output goes to `log`."""
        limited = ["prlimit", f"--nofile={OPEN_FILES}:"]
        command = [*limited, "sbatch", "--parsable", f"--output={log}", *options, script, *arguments]
        return Job(self, self.run(*command, **environment).stdout.strip(), log)

    def crash(self, node: str) -> None:
        """Cut the node's power: its processes are gone, and nobody is told."""
        self._tell(f"crash {node}")

    def boot(self, node: str, lacks: Path | None = None) -> None:
        """Start a node that crashed, and wait until it can take jobs; `lacks`: a directory that it finds empty."""
        self._tell(f"start {node} {lacks or ''}")
        self.wait_for([node], ("idle", "allocated"), PATIENCE)

    def _tell(self, line: str) -> None:
        assert self._keeper.stdin is not None
        self._keeper.stdin.write(line + "\n")
        self._keeper.stdin.flush()

    def wait_for(self, nodes: Sequence[str], states: Sequence[str], seconds: float) -> None:
        """Wait until all of these nodes are in one of these states.

        Raises:
            RuntimeError: they are not within so many seconds; with the last lines of the daemons' logs.
        """
        deadline, seen = time.monotonic() + seconds, ""
        command = ("sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%T")
        while True:
            with contextlib.suppress(RuntimeError):  # slurmctld does not listen yet
                seen = self.run(*command).stdout
            if seen and set(seen.split()) <= set(states):  # `idle*` has not answered yet
                return
            if time.monotonic() > deadline or self._keeper.poll() is not None:
                raise RuntimeError(f"nodes are {seen.split() or 'unknown'}\n{self._last_words()}")
            time.sleep(0.1)

    def _last_words(self) -> str:
        logs = [self.directory / "log" / name for name in ("munged.out", "slurmctld.out", "node1.out", "node1.log")]
        return "\n".join(f"{log}:\n{log.read_text()[-1000:]}" for log in logs if log.exists())


@dataclass(frozen=True)
class Job:
    """A submitted job and where its output goes."""

    cluster: Cluster
    number: str
    log: Path

    def read(self) -> dict[str, str]:
        """Return Slurm's record of it: JobState, ExitCode, Restarts, NodeList, Reason, ..."""
        text = self.cluster.run("scontrol", "--oneliner", "show", "job", self.number).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, states: Sequence[str] = ENDED, seconds: float = PATIENCE, restarts: int = 0) -> dict[str, str]:
        """Return Slurm's record of it, as soon as it is in one of these states after at least so many restarts.

        Raises:
            TimeoutError: it is not within so many seconds; with the end of its output.
        """
        deadline = time.monotonic() + seconds
        while True:
            job = self.read()
            if job["JobState"] in states and int(job["Restarts"]) >= restarts:
                return job
            if time.monotonic() > deadline:
                state = f"{job['JobState']} ({job['Reason']}) with {job['Restarts']} restarts"
                raise TimeoutError(f"job {self.number} is {state} after {seconds:.0f} s\n{self.output()[-3000:]}")
            time.sleep(0.2)

    def output(self) -> str:
        """Return its output, of all its attempts."""
        return self.log.read_text() if self.log.exists() else ""

    def nodes(self) -> list[str]:
        """Where it runs, or ran last."""
        return self.cluster.run("scontrol", "show", "hostnames", self.read()["NodeList"]).stdout.split()

    def release_refused(self) -> None:
        """Release a job that was submitted with `--hold`; the first node that is given it fails at its preparation, so
        that Slurm requeues it."""
        (self.cluster.directory / "etc" / f"refuses.{self.number}").touch()
        self.cluster.run("scontrol", "release", self.number)

    def expire(self, minutes: int, seconds: float) -> None:
        """Let its time limit come in so many minutes, and wait until it is requeued; its next attempt has an hour.

        A signal that it asked for so long before its end comes within 30 seconds.
        """
        self.cluster.run("scontrol", "update", f"JobId={self.number}", f"EndTime=now+{minutes}minutes")
        self.wait(("PENDING", "CONFIGURING", "RUNNING"), seconds, restarts=1)
        self.cluster.run("scontrol", "update", f"JobId={self.number}", "TimeLimit=60")

    def cancel(self) -> None:
        """End it, if it has not ended, and wait for that."""
        self.cluster.run("scancel", self.number)
        self.wait()


def _write_files(directory: Path, nodes: Sequence[str], newer: bool) -> None:
    for name in ("dev", "etc", "log", "munge/socket", "run", "state"):
        (directory / name).mkdir(parents=True)
    directory.chmod(0o755)  # munged refuses a socket that others could not reach
    (directory / "munge").chmod(0o711)
    key = directory / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for i in range(GPUS):
        (directory / "dev" / f"nvidia{i}").symlink_to("/dev/null")
    host = socket.gethostname().split(".")[0]
    addresses = {name: f"{NETWORK}.{number}" for number, name in enumerate(nodes, start=1)}
    hosts = [f"127.0.0.1 localhost {host}", *(f"{address} {name}" for name, address in addresses.items())]
    files = {
        "slurm.conf": SLURM_CONF.format(
            host=host,
            controller=CONTROLLER,
            timeout=60 if newer else 6,
            user=getpass.getuser(),
            directory=directory,
            plugins=f"PluginDir={NEWER}/plugins" if newer else "",
            nodes="\n".join(NODE.format(name=name, address=address) for name, address in addresses.items()),
        ),
        "gres.conf": GRES_CONF.format(directory=directory),
        "cgroup.conf": NEWER_CGROUP_CONF if newer else CGROUP_CONF,
        "plugstack.conf": "",
        "prolog": PROLOG.format(directory=directory),
        "hosts": "\n".join(hosts) + "\n",
    }
    for name, text in files.items():
        (directory / "etc" / name).write_text(text)
    (directory / "etc" / "prolog").chmod(0o755)
