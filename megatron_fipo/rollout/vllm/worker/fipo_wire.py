"""How weights travel from the trainer to a vLLM worker: what both sides must agree on. Pure torch.

A bucket is a list of named tensors. In a broadcast or through CUDA IPC it travels as one buffer of bytes in which each
tensor starts at a multiple of ALIGNMENT; in a file it is a safetensors file.
"""

from __future__ import annotations

import base64
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

ALIGNMENT = 16  # bytes
_BACKLOG = 2048
# Bytes of which a checksum is computed at a time, multiples of 8: few kernels on a GPU, temporaries in a CPU's cache.
_PIECE, _PIECE_CPU = 1 << 26, 1 << 18
# Constants of splitmix64's finalizer, as int64: a one-to-one map in which each bit of a word changes half of the rest.
_STEP, _FIRST, _SECOND = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def checksum(tensor: torch.Tensor) -> int:
    """Return 64 bits that depend on every byte and its position, the same on every device; computed on the tensor's.

    It takes a few times a piece of memory, whatever the size of the tensor.
    """
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    size = _PIECE_CPU if data.device.type == "cpu" else _PIECE
    for start in range(0, data.numel(), size):
        piece = data[start : start + size]
        words = torch.nn.functional.pad(piece, (0, -piece.numel() % 8)).view(torch.int64)
        positions = torch.arange(1, words.numel() + 1, device=words.device, dtype=torch.int64) + start // 8
        mixed = words + positions * _STEP  # int64 arithmetic wraps
        mixed = (mixed ^ _shifted(mixed, 30)) * _FIRST
        mixed = (mixed ^ _shifted(mixed, 27)) * _SECOND
        total += (mixed ^ _shifted(mixed, 31)).sum()
    return int(total.item())


def _shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, with zeros from the left; torch's own shift repeats the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def buffer_bytes(shapes: Sequence[Sequence[int]], dtypes: Sequence[str]) -> int:
    """Return the size of a buffer that holds tensors of these shapes."""
    return sum(_aligned(_num_bytes(s, d)) for s, d in zip(shapes, dtypes, strict=True))


def pack(tensors: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return the tensors' bytes as one uint8 buffer on `device`."""
    shapes, dtypes = [list(t.shape) for t in tensors], [dtype_name(t.dtype) for t in tensors]
    buffer = torch.zeros(buffer_bytes(shapes, dtypes), dtype=torch.uint8, device=device)
    for view, tensor in zip(unpack(buffer, shapes, dtypes), tensors, strict=True):
        view.copy_(tensor)
    return buffer


def unpack(buffer: torch.Tensor, shapes: Sequence[Sequence[int]], dtypes: Sequence[str]) -> list[torch.Tensor]:
    """Return views of the tensors in a buffer."""
    views, start = [], 0
    for shape, dtype in zip(shapes, dtypes, strict=True):
        size = _num_bytes(shape, dtype)
        views.append(buffer[start : start + size].view(getattr(torch, dtype)).view(list(shape)))
        start += _aligned(size)
    return views


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


class Group:
    """One sender, rank 0, and a server's workers: a process group beside whatever default group there is.

    Members of gloo listen at the address from which they reach the store, and at no other.
    """

    def __init__(self, backend: str, store: dist.TCPStore, rank: int, world_size: int, timeout: timedelta) -> None:
        members = dist.PrefixStore("fipo-weights", store)
        self._group: Any
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(members, rank, world_size, options)
        else:
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._timeout = timeout
            options._devices = [gloo.create_device(hostname=_address_towards(store.host))]
            self._group = gloo(members, rank, world_size, options)

    def broadcast(self, buffer: torch.Tensor) -> None:
        """Broadcast from rank 0 into every member's buffer; complete on return."""
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self._group.broadcast([buffer], options).wait()
        if buffer.is_cuda:
            torch.cuda.current_stream(buffer.device).synchronize()


def store(address: str, port: int, is_master: bool, timeout: timedelta) -> dist.TCPStore:
    """Return where a group's members meet. The master listens on this one address; port 0 takes a free port."""
    listener = socket.create_server((address, port), backlog=_BACKLOG) if is_master else None
    return dist.TCPStore(
        address,
        listener.getsockname()[1] if listener else port,
        is_master=is_master,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=listener.detach() if listener else None,
    )


def _address_towards(host: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.connect((host, 1))
        return probe.getsockname()[0]


# CUDA IPC: another process on the same GPU sees a buffer through these numbers, sent as JSON; no pickle.

_BYTES = (0, 4, 6)  # of what torch's `rebuild_cuda_tensor` takes after the device: the handles


def ipc_handle(buffer: torch.Tensor) -> dict[str, Any]:
    """Return the IPC handle of a flat uint8 buffer, which must not change until the other process is done."""
    from torch.multiprocessing.reductions import reduce_tensor

    shared = list(reduce_tensor(buffer)[1][7:])
    for index in _BYTES:
        shared[index] = base64.b64encode(shared[index]).decode()
    return {"gpu": gpu_name(buffer.device), "num_bytes": buffer.numel(), "shared": shared}


def from_ipc_handle(handle: dict[str, Any], device: torch.device) -> torch.Tensor:
    """Open the sender's buffer."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    shared = list(handle["shared"])
    for index in _BYTES:
        shared[index] = base64.b64decode(shared[index])
    shape = torch.Size([handle["num_bytes"]])
    return rebuild_cuda_tensor(
        torch.Tensor, shape, (1,), 0, torch.storage.TypedStorage, torch.uint8, device.index, *shared
    )


def gpu_name(device: torch.device) -> str:
    """Return a device's identity, the same in all processes, whatever devices are visible to them."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _aligned(size: int) -> int:
    return size + -size % ALIGNMENT


def _num_bytes(shape: Sequence[int], dtype: str) -> int:
    return torch.Size(shape).numel() * getattr(torch, dtype).itemsize
