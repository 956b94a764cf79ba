"""Three updates on a layout, started as `train` starts its ranks; entries must be importable in a rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_fipo import launch
from megatron_fipo.config import ParallelConfig
from tests.gpu.updates import Trained, first_log_ratio, trained

Sections = dict[str, dict[str, Any]]


Experts = list[list[torch.Tensor]] | None


def on_layout(
    path: Path, old: list[torch.Tensor], vocab: int, sections: Sections, out: Path, experts: Experts = None
) -> list[tuple[Trained, float]]:
    """Return each rank's results, with the given experts of each token, and its first log-ratio."""
    parallel = ParallelConfig(**sections.get("parallel", {}))
    out.mkdir(parents=True)
    launch.run(_rank, parallel, (path, old, vocab, sections, out, experts))
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(parallel.world_size)]


def _rank(path: Path, old: list[torch.Tensor], vocab: int, sections: Sections, out: Path, experts: Experts) -> None:
    result = trained(path, old, vocab, experts, **sections)
    ratio = first_log_ratio(path, vocab, **sections)
    torch.save((result, ratio), out / f"{dist.get_rank()}.pt")
