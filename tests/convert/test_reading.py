"""Slices of safetensors files, read as they lie in the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_fipo.convert import huggingface
from megatron_fipo.convert.huggingface import Checkpoint


@pytest.fixture
def path(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "matrix": torch.randn(37, 11, generator=generator).bfloat16(),
        "cube": torch.randn(5, 7, 3, generator=generator),
        "vector": torch.randn(13, generator=generator).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize("read_bytes", [7 * 22, 1 << 26])
@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("matrix", slice(None)),
        ("matrix", slice(5, 30)),
        ("matrix", slice(30, 5)),
        ("matrix", (slice(None), slice(3, 8))),
        ("matrix", (slice(2, 9), slice(8, None))),
        ("cube", slice(1, 4)),
        ("cube", (slice(None), slice(2, 5))),
        ("cube", (slice(1, 5), slice(None), slice(0, 2))),
        ("vector", slice(-6, -1)),
        ("empty", slice(None)),
    ],
)
def test_slices(
    name: str, index: slice | tuple[slice, ...], read_bytes: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit those of the whole tensor, whatever is asked for at once; contiguous, with nothing else in memory."""
    monkeypatch.setattr(huggingface, "_READ_BYTES", read_bytes)
    with safe_open(path / "model.safetensors", framework="pt") as file:
        expected = file.get_tensor(name)[index]
    found = Checkpoint(path).source(name)[index]
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found, expected)
    assert found.is_contiguous()
    assert found.untyped_storage().nbytes() == found.numel() * found.element_size()


def test_a_scalar(path: Path) -> None:
    """It has no axis to slice."""
    source = Checkpoint(path).source("scalar")
    assert (source.get_shape(), source[:].item(), source[:].shape) == ([], 2.5, torch.Size([]))


def test_only_the_rows_asked_for_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece: rows 5 to 30 of 22 bytes each."""
    checkpoint, read = Checkpoint(path), []
    original = huggingface.os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append(sum(b.nbytes for b in buffers))
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(huggingface.os, "preadv", preadv)
    checkpoint.source("matrix")[5:30]
    assert read == [25 * 22]


def test_a_file_that_was_cut_short_meanwhile(path: Path) -> None:
    """An error, and no tensor of zeros."""
    checkpoint = Checkpoint(path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(OSError, match="ends before its tensors do"):
        checkpoint.source("matrix")[:]
