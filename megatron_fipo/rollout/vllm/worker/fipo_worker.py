"""The receiving end of weight updates, loaded by every worker of a vLLM server (`--worker-extension-cls`).

Runs in vLLM's environment and imports nothing of the trainer's. Importing it registers the weight transfer engine
`fipo` with vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import fipo_proof
import fipo_wire
import torch
from safetensors import safe_open
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

_KEEP_EXPERTS = ("TRITON", "BATCHED_TRITON")  # vLLM's kernels that read experts as they are published


@dataclass
class InitInfo(WeightTransferInitInfo):
    """How weights will come.

    Attributes:
        transport: file | gloo | nccl | ipc.
        address, port: where a broadcast's sender waits for the workers.
        world_size: the sender and all workers of this server.
        timeout_seconds: of one broadcast.
    """

    transport: str = "file"
    address: str = ""
    port: int = 0
    world_size: int = 1
    timeout_seconds: float = 600.0


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One bucket.

    Attributes:
        path: file transport: the safetensors file.
        handles: ipc transport: a buffer's handle for each GPU.
        checksums: of each tensor, in the order of `names`; empty: not checked.
    """

    names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    path: str = ""
    handles: list[dict[str, Any]] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)


class FIPOWeightTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._how = InitInfo()
        self._group: fipo_wire.Group | None = None
        self.received: dict[str, tuple[int, torch.Size]] = {}  # checksums and shapes in the update that is under way

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        self._how, self._group = init_info, None
        if init_info.transport in ("gloo", "nccl"):
            timeout = timedelta(seconds=init_info.timeout_seconds)
            store = fipo_wire.store(init_info.address, init_info.port, is_master=False, timeout=timeout)
            rank = 1 + self.parallel_config.rank
            self._group = fipo_wire.Group(init_info.transport, store, rank, init_info.world_size, timeout)

    def start_weight_update(self) -> None:
        self.received = {}
        _forget_packed_experts(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load a bucket.

        Raises:
            RuntimeError: a tensor is not what was sent.
        """
        if update_info.path:
            with safe_open(update_info.path, "pt") as file:
                tensors = [file.get_tensor(name) for name in update_info.names]
        else:
            buffer = self._receive_buffer(update_info)
            tensors = fipo_wire.unpack(buffer, update_info.shapes, update_info.dtypes)
        if update_info.checksums:
            self._check(update_info, tensors)
        self.model.load_weights(zip(update_info.names, tensors, strict=True))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_head(self.model)

    def shutdown(self) -> None:
        self._group = None

    def _receive_buffer(self, info: UpdateInfo) -> torch.Tensor:
        if info.handles:
            name = fipo_wire.gpu_name(self.device)
            handle = next(h for h in info.handles if h["gpu"] == name)
            # A copy: layers keep what they are given until all of it has come, and the sender's buffer is used again.
            return fipo_wire.from_ipc_handle(handle, self.device).clone()
        assert self._group is not None, "a broadcast before init_transfer_engine"
        size = fipo_wire.buffer_bytes(info.shapes, info.dtypes)
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._group.broadcast(buffer)
        return buffer

    def _check(self, info: UpdateInfo, tensors: list[torch.Tensor]) -> None:
        for name, tensor, expected in zip(info.names, tensors, info.checksums, strict=True):
            found = fipo_wire.checksum(tensor)
            if found != expected:
                raise RuntimeError(f"{name} arrived with checksum {found & 2**64 - 1:016x}, not as it was sent")
            self.received[name] = (found, tensor.shape)


class WorkerExtension:
    """Methods that vLLM adds to its worker, called through /collective_rpc."""

    def fipo_loaded(self) -> dict[str, Any]:
        """Compare the model's parameters with what the last checked update brought.

        Returns {"compared": tensors compared, "received": tensors received, "different": names of those that differ}.
        What is split over workers, or rearranged for a kernel, is left out.
        """
        engine = self.weight_transfer_engine  # type: ignore[attr-defined]
        model, received = engine.model, engine.received
        shapes = {name: shape for name, (_, shape) in received.items()}
        compared, different = 0, []
        for name, value in fipo_proof.comparable(dict(model.named_parameters()), shapes, _experts_as_sent(model)):
            compared += 1
            if fipo_wire.checksum(value) != received[name][0]:
                different.append(name)
        return {"compared": compared, "received": len(received), "different": different}


def _experts_as_sent(model: torch.nn.Module) -> set[str]:
    """Return the names of the experts' parameters that their kernel reads as they were sent."""
    found = set()
    for name, module in model.named_modules():
        backend: Any = getattr(getattr(module, "quant_method", None), "unquantized_backend", None)
        if backend is not None and backend.name in _KEEP_EXPERTS:
            found |= {f"{name}.{leaf}" for leaf in fipo_proof.EXPERTS}
    return found


def _forget_packed_experts(model: torch.nn.Module) -> None:
    """On the CPU vLLM 0.32 packs experts only when it makes their kernel; an update would put unpacked ones there.

    Without a kernel the update makes one, and packs.
    """
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if current_platform.is_cpu() and getattr(method, "moe_kernel", None) is not None:
            method.moe_kernel = None


def _repack_tied_head(model: torch.nn.Module) -> None:
    """On the CPU a tied LM head computes with a packed copy of the embedding, which a reload leaves as it was."""
    head = getattr(model, "lm_head", None)
    embedding = getattr(getattr(model, "model", None), "embed_tokens", None)
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if current_platform.is_cpu() and tied and head is not None and embedding is not None and head is not embedding:
        head.weight = embedding.weight
        head.quant_method.process_weights_after_loading(head)


WeightTransferEngineFactory.register_engine("fipo", FIPOWeightTransferEngine)
