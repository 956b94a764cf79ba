"""Storage forms of a checkpoint's experts: one tensor per expert, or one for all experts of a layer.

transformers 5 holds `experts.gate_up_proj` [E, 2 * expert_ffn, hidden], gates above ups, and `experts.down_proj`
[E, hidden, expert_ffn], and can save them that way. Tables name experts one by one; only this file knows the other
form. E: experts of a layer.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_fipo.atomic_file import read_json
from megatron_fipo.convert import tables
from megatron_fipo.convert.huggingface import Checkpoint, PartLocation
from megatron_fipo.convert.staging import MANIFEST
from megatron_fipo.convert.transforms import Source
from megatron_fipo.model.architecture import Architecture

_FUSED = re.compile(r"model\.layers\.\d+\.(mlp|block_sparse_moe)\.experts\.(gate_up_proj|down_proj)$")
_EXPERT = re.compile(r"(model\.layers\.\d+\.)(mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight$")
_ROUTER = re.compile(r"(model\.layers\.\d+\.)(mlp|block_sparse_moe)(\.gate\.weight)$")
_PARTS = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 0, "w2": 0}
_DOWN = ("down_proj", "w2")
_PIECE = 1 << 24  # elements compared at a time


@dataclass(frozen=True)
class Part:
    """Rows of one expert in a tensor of all experts.

    Attributes:
        whole: name of that tensor.
        shape: of the part; the whole has `rows` rows per expert.
    """

    whole: str
    expert: int
    first_row: int
    rows: int
    shape: tuple[int, ...]

    @property
    def offset(self) -> int:
        """Element offset of the part, which is contiguous."""
        return (self.expert * self.rows + self.first_row) * self.shape[1]


class _PartSource:
    """Source that reads slices of a part."""

    def __init__(self, whole: Source, part: Part) -> None:
        self._whole, self._part = whole, part

    def get_shape(self) -> list[int]:
        return list(self._part.shape)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> torch.Tensor:
        rows, *columns = index if isinstance(index, tuple) else (index,)
        start, stop, step = rows.indices(self._part.shape[0])
        assert step == 1
        first = self._part.first_row
        expert = slice(self._part.expert, self._part.expert + 1)
        return self._whole[(expert, slice(first + start, first + max(start, stop)), *columns)][0]


def fused_block(names: Mapping[str, Any]) -> str | None:
    """Return the block that contains fused experts, `mlp` or `block_sparse_moe`; None without fused experts."""
    return next((found[1] for name in names if (found := _FUSED.match(name))), None)


def block_of(directory: Path) -> str | None:
    """Return `fused_block` of a checkpoint directory, or of the checkpoint it was converted from.

    Raises:
        ValueError: the checkpoint's files are damaged.
    """
    if any(directory.glob("*.safetensors")):
        return fused_block(Checkpoint(directory).shapes)
    manifest = directory / MANIFEST
    return read_json(manifest).get("fused_experts") if manifest.is_file() else None


class StoredCheckpoint:
    """Hugging Face checkpoint under published names, independent of how its experts are stored.

    Attributes:
        shapes, dtypes: by tensor name.
        block: block of fused experts; None: each expert has its own tensors.
    """

    def __init__(self, path: str | Path, arch: Architecture) -> None:
        """Read the headers, and compare weights that are stored twice.

        Raises:
            ValueError: the files are damaged; experts are stored in both forms or in a wrong shape; a tied output layer
                differs from the embedding.
        """
        self._files = Checkpoint(path)
        self.path = self._files.path
        self.shapes, self.dtypes = dict(self._files.shapes), dict(self._files.dtypes)
        self.block = fused_block(self.shapes)
        self._parts: dict[str, Part] = {}
        self._names: dict[str, str] = {}
        if self.block is not None:
            self._split_experts(arch, self.block)
        if arch.tied_embeddings:
            self._check_tied()

    def source(self, name: str) -> Source:
        """Return a lazily read tensor."""
        if name in self._parts:
            return _PartSource(self._files.source(self._parts[name].whole), self._parts[name])
        return self._files.source(self._names.get(name, name))

    def _split_experts(self, arch: Architecture, block: str) -> None:
        wholes, parts, renamed = _fused(arch, block)
        for name, shape in wholes.items():
            if name in self.shapes and self.shapes[name] != shape:
                raise ValueError(
                    f"{name} of {self.path} has shape {self.shapes[name]}, but its config.json requires {shape}: "
                    "experts, outputs, inputs"
                )
        for name, part in parts.items():
            if part.whole in self.shapes:
                if name in self.shapes:
                    raise ValueError(f"{self.path} has both {part.whole} and {name}, a part of it: remove one of them")
                self._parts[name] = part
        for name, part in self._parts.items():
            self.shapes[name], self.dtypes[name] = part.shape, self.dtypes[part.whole]
        for whole in {part.whole for part in self._parts.values()}:
            del self.shapes[whole], self.dtypes[whole]
        for name, stored in renamed.items():
            if stored in self.shapes and name not in self.shapes:
                self._names[name] = stored
                self.shapes[name], self.dtypes[name] = self.shapes.pop(stored), self.dtypes.pop(stored)

    def _check_tied(self) -> None:
        """Check tied weights: if they differ, transformers 5 unties them; transformers 4 and vLLM ignore the second."""
        names = ("model.embed_tokens.weight", "lm_head.weight")
        if not all(name in self.shapes for name in names) or _same(*(self._files.source(name) for name in names)):
            return
        raise ValueError(
            f"{self.path} has tie_word_embeddings=true in config.json, but {names[1]} differs from {names[0]}, and "
            "readers disagree on which to use: remove lm_head.weight, or set tie_word_embeddings to false "
            "(model.overrides.tie_word_embeddings=false) if it is the one that was trained"
        )


def stored_tensors(
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], arch: Architecture, block: str | None
) -> tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], dict[str, PartLocation], dict[str, str]]:
    """Return the stored tensors, the locations of given tensors that are parts, and stored names that differ.

    Args:
        tensors: shape and dtype by published names, in storage order.
        block: `fused_block` of the form to store; None: no fused experts.
    """
    if block is None:
        return dict(tensors), {}, {}
    wholes, parts, renamed = _fused(arch, block)
    stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, (shape, dtype) in tensors.items():
        if name in parts:
            stored.setdefault(parts[name].whole, (wholes[parts[name].whole], dtype))
        else:
            stored[renamed.get(name, name)] = (shape, dtype)
    return stored, {name: (part.whole, part.offset, part.shape) for name, part in parts.items()}, renamed


def _fused(arch: Architecture, block: str) -> tuple[dict[str, tuple[int, ...]], dict[str, Part], dict[str, str]]:
    """Return the fused tensors, their parts by published names, and the routers' stored names."""
    wholes: dict[str, tuple[int, ...]] = {}
    parts: dict[str, Part] = {}
    renamed: dict[str, str] = {}
    experts = arch.experts.count if arch.experts else 0
    for name, shape in tables.huggingface_shapes(arch).items():
        if found := _EXPERT.match(name):
            layer, _, expert, linear = found.groups()
            is_down = linear in _DOWN
            whole = f"{layer}{block}.experts.{'down_proj' if is_down else 'gate_up_proj'}"
            rows = shape[0] if is_down else 2 * shape[0]
            wholes[whole] = (experts, rows, shape[1])
            parts[name] = Part(whole, int(expert), _PARTS[linear] * shape[0], rows, shape)
        elif (found := _ROUTER.match(name)) and found[2] != block:
            renamed[name] = f"{found[1]}{block}{found[3]}"
    return wholes, parts, renamed


def _same(one: Source, other: Source) -> bool:
    if one.get_shape() != other.get_shape():
        return False
    return all(torch.equal(a.float(), b.float()) for a, b in zip(_pieces(one), _pieces(other), strict=True))


def _pieces(source: Source) -> Iterator[torch.Tensor]:
    rows, columns = source.get_shape()
    step = max(1, _PIECE // max(1, columns))
    for start, end in itertools.pairwise([*range(0, rows, step), rows]):
        yield source[start:end]
