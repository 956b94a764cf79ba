"""Utilization of the GPUs' peak FLOP/s in updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_fipo.config import Config
from megatron_fipo.model.architecture import Architecture
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.scaling.cost.flops import model_flops
from megatron_fipo.scaling.cost.hardware import find_hardware, name_of
from megatron_fipo.scaling.cost.model_shapes import shape_of


class Utilization:
    """Model FLOP/s and MFU of a step's updates.

    Counts forward and backward of all trained sequences with causal attention, without recomputation (PaLM, arXiv
    2204.02311, appendix B).
    """

    def __init__(self, config: Config, arch: Architecture, topology: Topology) -> None:
        self._model, self._topology = shape_of(arch), topology
        self._epochs = config.trainer.epochs_per_batch
        self._peak = _peak(config.model.dtype)

    def __call__(self, lengths: Sequence[int], seconds: float) -> dict[str, float]:
        """Return metrics; MFU only on a GPU with known peak. Collective.

        Args:
            lengths: of this replica's trained sequences, including prompts.
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
    """Return the data-sheet peak FLOP/s of this rank's GPU, or None."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    name = name_of(device.name, device.total_memory)
    return find_hardware(name).gpu.flops.get(dtype) if name else None
