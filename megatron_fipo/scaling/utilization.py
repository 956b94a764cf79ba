"""How much of the GPUs' arithmetic the updates use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_fipo.config import Config
from megatron_fipo.model.architecture import Architecture
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.scaling.flops import model_flops
from megatron_fipo.scaling.hardware import find_hardware, name_of
from megatron_fipo.scaling.models import shape_of


class Utilization:
    """Model FLOP/s of a step's updates: forward and backward of all trained sequences with causal attention, nothing
    that is recomputed (PaLM, arXiv 2204.02311, appendix B), over the updates' seconds."""

    def __init__(self, config: Config, arch: Architecture, topology: Topology) -> None:
        self._model, self._topology = shape_of(arch), topology
        self._epochs = config.trainer.epochs_per_batch
        self._peak = _peak(config.model.dtype)

    def __call__(self, lengths: Sequence[int], seconds: float) -> dict[str, float]:
        """Metrics; utilization only on a GPU whose peak is known. Collective.

        Args:
            lengths: of this replica's trained sequences, prompts included.
            seconds: of all updates on them.
        """
        sums = torch.tensor([sum(lengths), sum(n * n for n in lengths)], dtype=torch.float64)
        sums = sums.to(self._topology.device)
        dist.all_reduce(sums, group=self._topology.dp)
        tokens, squares = sums.tolist()
        rate = self._epochs * model_flops(self._model, tokens, squares) / seconds / self._topology.world_size
        metrics = {"throughput/update_tflops_per_rank": rate / 1e12}
        return {**metrics, "throughput/mfu": rate / self._peak} if self._peak else metrics


def _peak(dtype: str) -> float | None:
    """FLOP/s that this rank's GPU has on its data sheet."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    name = name_of(device.name, device.total_memory)
    return find_hardware(name).gpu.flops.get(dtype) if name else None
