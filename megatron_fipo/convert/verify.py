"""Verification that a Megatron and a Hugging Face checkpoint are the same model: tensors bit by bit, and logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_fipo.convert import tables
from megatron_fipo.convert.conversion import Progress, has_nan, no_progress, num_bytes, read_architecture
from megatron_fipo.convert.distributed import DistributedCheckpoint
from megatron_fipo.convert.stored import StoredCheckpoint

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 24  # elements compared at a time


@dataclass(frozen=True)
class Difference:
    """A tensor with differing bits, compared in Megatron's dtype. `largest` is NaN if one side is."""

    name: str
    dtype: torch.dtype
    num_different: int
    num_elements: int
    largest: float

    def __str__(self) -> str:
        share = f"{self.num_different} of {self.num_elements} elements"
        return f"{self.name}: {share} differ, by up to {self.largest:.3g} ({str(self.dtype).removeprefix('torch.')})"


@dataclass
class Verification:
    differences: list[Difference]
    with_nan: list[str]


def verify(huggingface: Path, megatron: Path, progress: Progress = no_progress) -> Verification:
    """Compare names and shapes, then every bit; a Hugging Face tensor of another dtype is first rounded to Megatron's.

    Raises:
        ValueError: a checkpoint is damaged, or names or shapes do not fit.
    """
    arch = read_architecture(huggingface)
    source, converted = StoredCheckpoint(huggingface, arch), DistributedCheckpoint(megatron)
    tables.check_tensors(source.shapes, arch, str(huggingface))
    converted.check(arch)
    result = Verification([], [])
    parameters = list(tables.parameters(arch))
    size = sum(num_bytes(p.shape, converted.dtype(p)) for p in parameters)
    for parameter in parameters:
        whole = converted.read(parameter)
        parts = parameter.transform.merge([whole], arch)
        for name, part in zip(parameter.huggingface, parts, strict=True):
            if has_nan(part):
                result.with_nan.append(name)
            if difference := compare(name, source.source(name)[:], part):
                result.differences.append(difference)
        progress(num_bytes(parameter.shape, whole.dtype), size)
    return result


def compare(name: str, expected: torch.Tensor, found: torch.Tensor) -> Difference | None:
    """Return the difference of two tensors; None if all bits are equal, NaNs included."""
    count, largest = 0, 0.0
    for ours, theirs in _pieces(found, expected):
        different = theirs.view(_INTEGERS[theirs.itemsize]) != ours.view(_INTEGERS[ours.itemsize])
        if different.any():
            count += int(different.sum())
            gap = (theirs[different].double() - ours[different].double()).abs().max()
            largest = max(largest, gap.item()) if not gap.isnan() else float("nan")
    return Difference(name, found.dtype, count, found.numel(), largest) if count else None


def _pieces(found: torch.Tensor, expected: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for ours, theirs in zip(found.flatten().split(_PIECE), expected.flatten().split(_PIECE), strict=True):
        yield ours, theirs.to(found.dtype)
