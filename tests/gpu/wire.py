"""Weights between two processes: a sender here, and a receiver as a server's worker is, in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import torch

from megatron_fipo.rollout.vllm.buckets import Bucket
from megatron_fipo.rollout.vllm.transport import IPCTransport
from megatron_fipo.rollout.vllm.worker import fipo_wire

TIMEOUT = timedelta(seconds=120)
ELEMENTS = 1 << 18


def broadcasts(backend: str, devices: Sequence[str], count: int) -> list[bool]:
    """Send `count` buffers over a process group of `backend`. Returns whether each arrived bit for bit."""
    store = fipo_wire.store("127.0.0.1", 0, is_master=True, timeout=TIMEOUT)
    with _Receiver(_receive_broadcasts, (backend, store.port, devices[1], count)) as receiver:
        group = fipo_wire.Group(backend, store, 0, 2, TIMEOUT)
        expected = []
        for number in range(count):
            buffer = fipo_wire.pack(_tensors(number, devices[0]), torch.device(devices[0]))
            expected.append(fipo_wire.checksum(buffer))
            group.broadcast(buffer)
        found = receiver.get()
    return [a == b for a, b in zip(found, expected, strict=True)]


def _receive_broadcasts(link: Connection, backend: str, port: int, device: str, count: int) -> None:
    if device != "cpu":
        torch.cuda.set_device(device)
    store = fipo_wire.store("127.0.0.1", port, is_master=False, timeout=TIMEOUT)
    group = fipo_wire.Group(backend, store, 1, 2, TIMEOUT)
    tensors = _tensors(0, device)
    size = fipo_wire.buffer_bytes([list(t.shape) for t in tensors], [fipo_wire.dtype_name(t.dtype) for t in tensors])
    found = []
    for _ in range(count):
        buffer = torch.empty(size, dtype=torch.uint8, device=device)
        group.broadcast(buffer)
        found.append(fipo_wire.checksum(buffer))
    link.send(found)


def shown(count: int) -> tuple[list[bool], list[int]]:
    """Send `count` buckets through CUDA IPC on one GPU. Returns whether each arrived, and bytes allocated after each.

    Needs a default process group of this process alone.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    transport = IPCTransport(device, 0, [[0]])
    arrived, allocated = [], []
    with _Receiver(_receive_handles, (device.index,)) as receiver:

        def post(route: str, body: dict[str, Any], timeout: float) -> None:
            receiver.link.send(body["update_info"]["handles"][0])
            arrived.append(receiver.get() == expected)

        control: Any = SimpleNamespace(post=post)
        for number in range(count):
            tensors = _tensors(number, "cuda")
            expected = fipo_wire.checksum(fipo_wire.pack(tensors, device))
            bucket = Bucket([str(i) for i in range(len(tensors))], tensors)
            transport.deliver(0, control, transport.stage("1", number, bucket, checked=False))
            allocated.append(torch.cuda.memory_allocated())
        transport.finish("1", complete=True)
        receiver.link.send(None)
    return arrived, allocated


def _receive_handles(link: Connection, index: int) -> None:
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    while (handle := link.recv()) is not None:
        link.send(fipo_wire.checksum(fipo_wire.from_ipc_handle(handle, device).clone()))


def _tensors(seed: int, device: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(ELEMENTS, generator=generator)
    return [values[: ELEMENTS // 2].to(device), values[ELEMENTS // 2 :].bfloat16().to(device)]


class _Receiver:
    """Child process that is ended with the block; `link` is a pipe to it."""

    def __init__(self, function: Any, arguments: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self.link, end = context.Pipe()
        self._process = context.Process(target=function, args=(end, *arguments), daemon=True)

    def __enter__(self) -> _Receiver:
        self._process.start()
        return self

    def get(self) -> Any:
        """Return the next message.

        Raises:
            RuntimeError: nothing came in time.
        """
        if not self.link.poll(TIMEOUT.total_seconds()):
            raise RuntimeError(f"the receiver sent nothing; its exit code is {self._process.exitcode}")
        return self.link.recv()

    def __exit__(self, *error: object) -> None:
        self._process.join(timeout=20 if error[0] is None else 0)
        self._process.kill()
        self._process.join()
