"""Ways for a bucket of weights to reach a server's workers.

file: rank 0 writes safetensors files, by default in shared memory, which every server reads. The newest version stays,
so that a restarted server can load it at any time.
gloo, nccl: a process group for each server, of one rank of the trainer and the server's workers. Servers are shared out
over ranks, so that several ranks send at the same time, and one server's failure breaks one group.
ipc: a rank on each of a server's GPUs shares a buffer with the worker there.

nccl and ipc have not been run yet.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_fipo.atomic_file import atomic_file
from megatron_fipo.parallel.collectives import gather
from megatron_fipo.rollout.vllm.buckets import Bucket
from megatron_fipo.rollout.vllm.control import Control
from megatron_fipo.rollout.vllm.worker import fipo_wire

TRANSFER_SECONDS = 600.0  # of one bucket


class Transport(Protocol):
    """Sends this rank's buckets; `feeds` are the servers for which it does."""

    @property
    def feeds(self) -> Sequence[int]: ...

    def connect(self, server: int, control: Control, incarnation: int) -> None:
        """Prepare to send to a server; called for every update."""

    def stage(self, version: str, number: int, bucket: Bucket, checked: bool) -> dict[str, Any]:
        """Stage a bucket for sending and return its metadata for the receivers. Called on every rank.

        Raises:
            OSError: it cannot be written.
        """

    def deliver(self, server: int, control: Control, metadata: dict[str, Any]) -> None:
        """Send the staged bucket. Called for several servers at the same time."""

    def finish(self, version: str, complete: bool) -> None:
        """Clean up after the last bucket, on every rank."""

    def close(self) -> None: ...


class FileTransport:
    """Files `DIRECTORY/VERSION/N.safetensors`; the metadata of the newest version is kept as well.

    DIRECTORY is made here, for this user alone, and removed at the end.
    """

    def __init__(self, directory: Path, rank: int, num_servers: int) -> None:
        self.feeds = range(num_servers) if rank == 0 else range(0)
        self.directory = directory
        self._writes = rank == 0
        self._made = False
        self._metadata: list[dict[str, Any]] = []
        self.newest: tuple[str, list[dict[str, Any]]] | None = None

    def connect(self, server: int, control: Control, incarnation: int) -> None:
        control.post("/init_weight_transfer_engine", {"init_info": {"transport": "file"}}, timeout=TRANSFER_SECONDS)

    def stage(self, version: str, number: int, bucket: Bucket, checked: bool) -> dict[str, Any]:
        if not self._writes:
            return {}
        if not self._made:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self.directory.mkdir(mode=0o700)  # not one that another user made
            self._made = True
        folder = self.directory / version
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder / f"{number}.safetensors"
        # Copies: parts of a fused parameter share memory, which safetensors refuses.
        tensors = {n: t.to("cpu", copy=True).contiguous() for n, t in zip(bucket.names, bucket.tensors, strict=True)}
        with atomic_file(path) as unfinished:
            save_file(tensors, unfinished)
            unfinished.chmod(0o600)  # some releases of safetensors make files that everybody may read
        metadata = {**bucket.description(checked), "path": str(path.absolute())}
        self._metadata.append(metadata)
        return metadata

    def deliver(self, server: int, control: Control, metadata: dict[str, Any]) -> None:
        control.post("/update_weights", {"update_info": metadata}, timeout=TRANSFER_SECONDS)

    def finish(self, version: str, complete: bool) -> None:
        if self._writes:
            old = version if not complete else None if self.newest is None else self.newest[0]
            if complete:
                self.newest = version, self._metadata
            self._metadata = []
            if old is not None:
                shutil.rmtree(self.directory / old, ignore_errors=True)

    def close(self) -> None:
        if self._made:
            shutil.rmtree(self.directory, ignore_errors=True)
            self._made = False


class BroadcastTransport:
    """Every server's group has the rank that feeds it first, then the server's workers."""

    def __init__(self, backend: str, device: torch.device, address: str, rank: int, ranks: int, servers: int) -> None:
        self.feeds = range(rank, servers, ranks)
        self._backend, self._device, self._address = backend, device, address
        self._groups: dict[int, tuple[int, fipo_wire.Group]] = {}  # server -> its incarnation, the group
        self._buffer = torch.empty(0)

    def connect(self, server: int, control: Control, incarnation: int) -> None:
        if server in self._groups and self._groups[server][0] == incarnation:
            return
        timeout = timedelta(seconds=TRANSFER_SECONDS)
        world = 1 + control.world_size(timeout=60)
        store = fipo_wire.store(self._address, 0, is_master=True, timeout=timeout)
        how = {"transport": self._backend, "address": self._address, "port": store.port, "world_size": world}
        connected = _in_background(control, "/init_weight_transfer_engine", {"init_info": how})
        self._groups[server] = incarnation, fipo_wire.Group(self._backend, store, 0, world, timeout)
        connected.result()

    def stage(self, version: str, number: int, bucket: Bucket, checked: bool) -> dict[str, Any]:
        if not self.feeds:
            return {}
        self._buffer = fipo_wire.pack(bucket.tensors, self._device)
        return bucket.description(checked)

    def deliver(self, server: int, control: Control, metadata: dict[str, Any]) -> None:
        answer = _in_background(control, "/update_weights", {"update_info": metadata})
        self._groups[server][1].broadcast(self._buffer)
        answer.result()

    def finish(self, version: str, complete: bool) -> None:
        self._buffer = torch.empty(0)

    def close(self) -> None:
        self._groups.clear()


class IPCTransport:
    """Server s takes its handles from the ranks of `groups[s]`, of which the first one sends its requests."""

    def __init__(self, device: torch.device, rank: int, members: Sequence[Sequence[int]]) -> None:
        groups = [dist.new_group(list(ranks)) for ranks in members]  # collective over all ranks
        self._server = next(s for s, ranks in enumerate(members) if rank in ranks)
        self._group, self._first = groups[self._server], members[self._server][0]
        self.feeds = [self._server] if rank == self._first else []
        self._device = device
        self._buffer = torch.empty(0)

    def connect(self, server: int, control: Control, incarnation: int) -> None:
        control.post("/init_weight_transfer_engine", {"init_info": {"transport": "ipc"}}, timeout=TRANSFER_SECONDS)

    def stage(self, version: str, number: int, bucket: Bucket, checked: bool) -> dict[str, Any]:
        dist.barrier(self._group)  # the first rank has delivered the bucket before
        # torch keeps memory that is shared with another process until that process has released it.
        self._buffer = torch.empty(0)
        torch.cuda.ipc_collect()
        self._buffer = fipo_wire.pack(bucket.tensors, self._device)
        torch.cuda.synchronize(self._device)
        handles = gather(fipo_wire.ipc_handle(self._buffer), self._group)
        return {**bucket.description(checked), "handles": handles}

    def deliver(self, server: int, control: Control, metadata: dict[str, Any]) -> None:
        control.post("/update_weights", {"update_info": metadata}, timeout=TRANSFER_SECONDS)

    def finish(self, version: str, complete: bool) -> None:
        dist.barrier(self._group)
        self._buffer = torch.empty(0)
        torch.cuda.ipc_collect()

    def close(self) -> None:
        self._buffer = torch.empty(0)


def own_directory(parent: str | None, run: str) -> Path:
    """Return the directory of a run's weights, in `parent` or this machine's shared memory, which is not made yet.

    The guard of a server removes it should this process be killed.
    """
    memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path("/tmp")
    return (Path(parent).absolute() if parent else memory) / f"megatron-fipo-weights-{os.getpid()}-{run}"


def _in_background(control: Control, route: str, body: dict[str, Any]) -> Future[dict[str, Any]]:
    pool = ThreadPoolExecutor(1)
    answer = pool.submit(control.post, route, body, timeout=TRANSFER_SECONDS)
    pool.shutdown(wait=False)
    return answer
