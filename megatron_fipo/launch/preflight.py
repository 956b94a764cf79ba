"""Checks before anything is built: all ranks are there, run the same software, see the same files, reach each other.

An error names the rank or node at fault, instead of a timeout of some collective half an hour later.
"""

from __future__ import annotations

import ipaddress
import json
import os
import platform
import shutil
import socket
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from megatron_fipo.exit_codes import MachineFailure
from megatron_fipo.launch import slurm
from megatron_fipo.launch.rank_task import NOTHING, Requirements
from megatron_fipo.machine import gpus
from megatron_fipo.machine.host import host

_ARRIVAL, _ARRIVAL_A_RANK = timedelta(minutes=10), timedelta(seconds=4)  # for imports from a busy network file system
_CONNECTION = timedelta(minutes=2)  # for all ranks to connect to each other and reduce a number
_VISIBLE_SECONDS = 60.0  # network file systems cache directory listings
_OTHERS_SECONDS = 2.0  # for the other ranks to report what they reached
_BACKLOG = 2048
_GIB = 2**30
_LITTLE_DISK, _NO_DISK = 20 * _GIB, 2**27
_LITTLE_DEVICE_MEMORY = 0.9  # share of the total


@dataclass(frozen=True)
class Facts:
    """Facts about a rank and its node; None: no GPU, or no run directory."""

    rank: int
    host: str
    versions: dict[str, str]
    sees_directory: bool | None
    free_device_memory: float | None = None  # share of the total
    gpu: str | None = None  # its UUID
    problems: list[str] = field(default_factory=list)  # of this rank's node


def connect(
    timeout: timedelta,
    run_directory: Path | None,
    store: Path | None = None,
    requirements: Requirements = NOTHING,
    nccl_timeout: timedelta | None = None,
) -> None:
    """Check the ranks and create the default process group. Rank 0 decides, and prints one line.

    Args:
        timeout: of the group's collectives.
        run_directory: directory that all ranks must see.
        store: file through which local ranks find each other; None: through MASTER_ADDR and MASTER_PORT.
        nccl_timeout: of the group's collectives on GPUs; None: `timeout`.

    Raises:
        ValueError: what to change, and on which node.
        MachineFailure: some nodes lack what the others have.
        ConnectionError: ranks did not start, or cannot be reached.
    """
    started = time.monotonic()
    arrival = _arrival(timeout, int(os.environ["WORLD_SIZE"]))
    ranks = _Ranks(_store(arrival, store))
    facts = ranks.gather(arrival, run_directory, requirements)
    with ranks.named_on_error():
        _initialize(ranks, min(timeout, _CONNECTION))
    ranks.shared_store.set_timeout(timeout)
    dist.distributed_c10d._set_pg_timeout(timeout)
    if nccl_timeout is not None and torch.cuda.is_available():
        assert dist.group.WORLD is not None
        dist.group.WORLD._get_backend(torch.device("cuda"))._set_default_timeout(min(timeout, nccl_timeout))
    if facts:
        for warning in [*_memory_warnings(facts), *_disk_warnings(run_directory)]:
            print(f"warning: {warning}", flush=True)
        nodes = len({f.host for f in facts})
        print(
            f"preflight: {ranks.world_size} {'rank' if ranks.world_size == 1 else 'ranks'} on {nodes} "
            f"{'node' if nodes == 1 else 'nodes'} ok ({time.monotonic() - started:.1f} s)",
            flush=True,
        )


def _arrival(timeout: timedelta, ranks: int) -> timedelta:
    """Return the time that ranks have to start: hundreds of them import from one file system."""
    return min(timeout, _ARRIVAL + ranks * _ARRIVAL_A_RANK)


def device_index() -> int:
    """Return the index of this rank's GPU among those that this process sees.

    Raises:
        ValueError: there are more ranks than GPUs on this node.
    """
    local_rank, visible = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if visible == 1:  # srun has bound this task to one
        return 0
    if local_rank >= visible:
        local_ranks = os.environ.get("LOCAL_WORLD_SIZE", str(local_rank + 1))
        raise ValueError(
            f"{local_ranks} ranks on {host()}, which has {visible} GPUs: start at most {visible} ranks on a node"
        )
    return local_rank


class _Ranks:
    """Exchange between ranks through a key-value store, before there is a process group."""

    def __init__(self, store: dist.Store) -> None:
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.store = dist.PrefixStore("preflight", store)
        self.shared_store = store

    def gather(
        self,
        timeout: timedelta,
        run_directory: Path | None,
        requirements: Requirements = NOTHING,
    ) -> list[Facts]:
        """Return all ranks' facts on rank 0, which has checked them, and [] on the others, which wait for that."""
        with self._rank_0_blamed():
            token = self._token(timeout, run_directory)
            facts = Facts(
                self.rank,
                host(),
                _versions(),
                _is_visible(token) if token else None,
                _free_device_memory(),
                _gpu(),
                [*requirements.problems(), *_gpu_problems(requirements)],
            )
            self.store.set(f"facts/{self.rank}", json.dumps(asdict(facts)))
            if self.rank != 0:
                self.store.wait(["checked"], timeout + timedelta(seconds=_VISIBLE_SECONDS))
                return []
        try:
            gathered = self._arrived(timeout)
        finally:
            if token:
                token.unlink(missing_ok=True)
        _check(gathered, run_directory, requirements)
        self.store.set("checked", "")
        return gathered

    def _token(self, timeout: timedelta, run_directory: Path | None) -> Path | None:
        """Return a file that rank 0 has just created in the run directory, by which other nodes are compared."""
        if run_directory is None:
            return None
        if self.rank == 0:
            run_directory.mkdir(parents=True, exist_ok=True)
            _check_disk(run_directory)
            token = run_directory / f".preflight-{uuid.uuid4().hex}"
            token.touch()
            self.store.set("token", token.name)
            return token
        self.store.wait(["token"], timeout)
        return run_directory / self.store.get("token").decode()

    @contextmanager
    def _rank_0_blamed(self) -> Iterator[None]:
        """Raise an error that names rank 0, on the others, if it ends or never answers inside."""
        try:
            yield
        except dist.DistError as error:
            if self.rank == 0:
                raise
            raise ConnectionError(f"rank 0 did not confirm that all ranks are ready: {error}") from None

    def _arrived(self, timeout: timedelta) -> list[Facts]:
        keys = [f"facts/{rank}" for rank in range(self.world_size)]
        try:
            self.store.wait(keys, timeout)
        except dist.DistStoreError:
            found = self._facts()
            raise ConnectionError(_missing_ranks(found, self.world_size, timeout)) from None
        return self._facts()

    def _facts(self) -> list[Facts]:
        """Return the facts of the ranks that have arrived."""
        keys = [f"facts/{rank}" for rank in range(self.world_size)]
        return [Facts(**json.loads(self.store.get(key))) for key in keys if self.store.check([key])]

    @contextmanager
    def named_on_error(self) -> Iterator[None]:
        """Report that this rank reached the others inside; on an error, name the ranks that did not.

        Raises:
            ConnectionError: in place of torch's error when a rank cannot be reached.
        """
        try:
            yield
        except RuntimeError as error:
            time.sleep(_OTHERS_SECONDS)
            behind = [f for f in self._facts() if not self.store.check([f"reached/{f.rank}"])]
            raise ConnectionError(
                f"{_ranks_by_host(behind)} could not reach all the others. "
                "If a node has several networks, name the one to use in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME. "
                f"torch's error: {error}"
            ) from error
        self.store.set(f"reached/{self.rank}", "")


def _store(timeout: timedelta, file: Path | None) -> dist.Store:
    """Return the ranks' key-value store. Write access to it runs code in ranks: torch unpickles what they exchange."""
    if file is not None:
        found = dist.FileStore(str(file), int(os.environ["WORLD_SIZE"]))
        found.set_timeout(timeout)
        return found
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's own
        return next(rendezvous("env://", timeout=timeout))[0]
    rank, address, port = int(os.environ["RANK"]), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return dist.TCPStore(
            address,
            port,
            is_master=rank == 0,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=_listener(address, port).detach() if rank == 0 else None,
        )
    except (dist.DistNetworkError, OSError) as error:
        if rank == 0:
            advice = "choose another MASTER_PORT; MASTER_ADDR must be an address of rank 0's machine"
            raise ConnectionError(f"cannot listen at {address}:{port}; {advice}: {error}") from None
        raise ConnectionError(f"no answer from rank 0 at {address}:{port} to {host()}: {error}") from None


def _listener(address: str, port: int) -> socket.socket:
    """Return a socket that listens at one address, unless other nodes could not reach it.

    Some distributions resolve a machine's own name to a loopback address.
    """
    family, _, _, _, resolved = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    others = int(os.environ["WORLD_SIZE"]) > int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    hidden = others and ipaddress.ip_address(resolved[0]).is_loopback and resolved[0] != address
    return socket.create_server(("", port) if hidden else resolved[:2], family=family, backlog=_BACKLOG)


def _initialize(ranks: _Ranks, timeout: timedelta) -> None:
    on_gpu = torch.cuda.is_available()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=ranks.shared_store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timeout,
    )
    devices = [torch.device("cpu"), *([torch.device("cuda", torch.cuda.current_device())] if on_gpu else [])]
    for device in devices:
        one = torch.ones(1, device=device)
        dist.all_reduce(one)
        if one.item() != ranks.world_size:
            raise RuntimeError(f"the ranks' ones add up to {one.item()} on {device.type}, not {ranks.world_size}")


def _versions() -> dict[str, str]:
    packages = ("megatron-fipo", "torch", "megatron-core", "transformers")
    return {"Python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # run from its sources
        return "not installed"


def _free_device_memory() -> float | None:
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return free / total


def _gpu() -> str | None:
    """Return the UUID of this rank's GPU."""
    return (
        str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid) if torch.cuda.is_available() else None
    )


def _gpu_problems(requirements: Requirements) -> list[str]:
    gpu = _gpu()
    problem = None if gpu is None else gpus.compute_mode_problem(gpu, requirements.shared_gpus)
    return [] if problem is None else [problem]


def _is_visible(file: Path) -> bool:
    """Return whether this node sees the file within a minute."""
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while True:
        try:  # a network file system answers a listing anew, but may repeat a cached answer about one name
            if file.name in os.listdir(file.parent):
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def _check(facts: Sequence[Facts], run_directory: Path | None, requirements: Requirements = NOTHING) -> None:
    """Raise one error with all problems of the ranks.

    What only some nodes lack is a failure of these machines; what all lack is an error of the input.
    """
    problems, lacking, blamed = [], [], []
    for text in dict.fromkeys(text for f in facts for text in f.problems):
        others = [f for f in facts if text in f.problems]
        if len({f.host for f in others}) == len({f.host for f in facts}):
            problems.append(text)
        else:
            lacking.append(f"{_ranks_by_host(others)}: {text}")
            blamed += [f.host for f in others]
    for name, reference in facts[0].versions.items():
        others = [f for f in facts if f.versions.get(name) != reference]
        if others:
            found = others[0].versions.get(name)
            problems.append(
                f"{name} is {reference} on {facts[0].host}, but {found} for {_ranks_by_host(others)}: "
                "start all ranks from the same environment"
            )
    blind = [f for f in facts if f.sees_directory is False]
    if blind:
        problems.append(
            f"{run_directory} is not the same directory on {facts[0].host} and for {_ranks_by_host(blind)}: choose a "
            "run.directory on a file system that all nodes share"
        )
    if requirements.one_node and len({f.host for f in facts}) > 1:
        problems.append(requirements.one_node)
    for gpu in dict.fromkeys(f.gpu for f in facts if f.gpu is not None):
        sharing = [f for f in facts if f.gpu == gpu]
        if len(sharing) > 1:
            problems.append(
                f"{_ranks_by_host(sharing)} have the same GPU, {gpu}: start at most as many ranks on a node as it has "
                "GPUs, and let each rank see all of them, or one of its own"
            )
    if problems:
        raise ValueError("\n".join([*problems, *lacking]))
    if lacking:
        raise MachineFailure("\n".join(lacking), list(dict.fromkeys(blamed)))


def _check_disk(run_directory: Path) -> None:
    free = shutil.disk_usage(run_directory).free
    if free < _NO_DISK:
        raise ValueError(f"{free / 2**20:.0f} MiB free in {run_directory}: make room, or choose another run.directory")


def _disk_warnings(run_directory: Path | None) -> list[str]:
    free = shutil.disk_usage(run_directory).free if run_directory else _LITTLE_DISK
    return [f"only {free / _GIB:.1f} GiB free in {run_directory}"] if free < _LITTLE_DISK else []


def _memory_warnings(facts: Sequence[Facts]) -> list[str]:
    used = [f for f in facts if f.free_device_memory is not None and f.free_device_memory < _LITTLE_DEVICE_MEMORY]
    shares = ", ".join(f"{f.free_device_memory:.0%}" for f in used[:8])
    return [f"another process holds memory of the GPU of {_ranks_by_host(used)}; free are {shares}"] if used else []


def _missing_ranks(found: Sequence[Facts], world_size: int, timeout: timedelta) -> str:
    present = {f.rank for f in found}
    missing = ", ".join(str(r) for r in range(world_size) if r not in present)
    text = f"{len(present)} of {world_size} ranks started within {timeout.total_seconds():.0f} s, without {missing}"
    if not slurm.is_task(os.environ):
        return text
    silent = [n for n in slurm.step_nodes(os.environ) if n not in {f.host for f in found}]
    return f"{text}; no rank started on {', '.join(silent)}" if silent else text


def _ranks_by_host(facts: Sequence[Facts]) -> str:
    """Return text such as `ranks 4, 5 on node2 and rank 7 on node3`."""
    by_host: dict[str, list[str]] = defaultdict(list)
    for f in facts:
        by_host[f.host].append(str(f.rank))
    parts = [f"{'rank' if len(r) == 1 else 'ranks'} {', '.join(r)} on {h}" for h, r in by_host.items()]
    return " and ".join(parts)
