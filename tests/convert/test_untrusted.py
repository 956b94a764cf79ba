"""Metadata of a Megatron checkpoint that somebody has made: nothing runs, nothing changes, no file outside is read."""

from __future__ import annotations

import gc
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import metadata as torch_metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_fipo.convert.distributed import DistributedCheckpoint
from megatron_fipo.convert.untrusted import code_refused, read_metadata

BACKEND = '{"sharded_backend": "torch_dist"}'
EVIL = b"N}U\x04evilK\x01s\x86b."  # BUILD with the state (None, {"evil": 1})


def metadata(**changes: Any) -> Metadata:
    """Make a checkpoint of one tensor of 2 x 3 in two chunks, and an object."""
    chunks = [ChunkStorageMetadata(torch.Size([row, 0]), torch.Size([1, 3])) for row in range(2)]
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), torch.Size([2, 3]), chunks)
    places: Any = {
        MetadataIndex("embedding.x", chunk.offsets, i): _StorageInfo("__0_0.distcp", 10 * i, 10)
        for i, chunk in enumerate(chunks)
    }
    found = Metadata({"embedding.x": tensor, "state": BytesStorageMetadata()}, None, places, StorageMeta())
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def write(directory: Path, content: Any) -> Path:
    (directory / "metadata.json").write_text(BACKEND)
    data = content if isinstance(content, bytes) else pickle.dumps(content)
    (directory / ".metadata").write_bytes(data)
    return directory


def test_metadata_is_what_torch_reads(tmp_path: Path) -> None:
    """By this reader, at first and again, and inside `code_refused` by torch's own, which is itself afterwards."""
    path = write(tmp_path, metadata())
    expected = FileSystemReader(path).read_metadata()
    plain = FileSystemReader.read_metadata
    for _ in range(2):
        found = read_metadata(path)
        assert (found.state_dict_metadata, found.storage_data) == (expected.state_dict_metadata, expected.storage_data)
        assert gc.isenabled()
    with code_refused(path):
        reader = FileSystemReader(path)
        inside = reader.read_metadata()
        assert FileSystemReader.read_metadata is not plain
        assert inside.storage_meta.load_id == reader.load_id
        assert inside.state_dict_metadata == expected.state_dict_metadata
    assert FileSystemReader.read_metadata is plain


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_a_path_from_any_python(module: str, tmp_path: Path) -> None:
    """Torch stores where it wrote a checkpoint, and Python 3.13 calls the module of that path by another name."""
    content = pickle.dumps(metadata(storage_meta=StorageMeta(checkpoint_id=Path("a/step_1"))), 2)
    here = b"c" + type(tmp_path).__module__.encode() + b"\n"
    assert content.count(here) == 1
    found = read_metadata(write(tmp_path, content.replace(here, b"c" + module.encode() + b"\n")))
    assert found.storage_meta is not None
    assert found.storage_meta.checkpoint_id == Path("a/step_1")


@pytest.mark.parametrize(
    "target",
    [
        "torch.distributed.checkpoint.metadata\nMetadata",
        "torch.distributed.checkpoint.metadata\nTensorProperties",
        "torch.serialization\n_get_layout",
        "pathlib\nPosixPath",
        "torch\nSize",
        "torch\nbfloat16",
    ],
)
def test_classes_stay_as_they_are(target: str, tmp_path: Path) -> None:
    """A file cannot set an attribute of what it names, which would then be every other object's."""
    path = write(tmp_path, b"\x80\x02c" + target.encode() + b"\n" + EVIL)
    for _ in range(2):  # what was refused once is checked again
        with pytest.raises(ValueError, match="which is not an object of the checkpoint"):
            read_metadata(path)
    assert not hasattr(Metadata, "evil")
    assert not hasattr(TensorProperties, "evil")


def test_members_of_enumerations_stay_as_they_are(tmp_path: Path) -> None:
    """They are shared by everything that was read."""
    member = torch_metadata._MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    path = write(tmp_path, pickle.dumps(member, 2)[:-1] + EVIL)
    with pytest.raises(ValueError, match="which is not an object of the checkpoint"):
        read_metadata(path)
    assert not hasattr(member, "evil")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "", ".."])
def test_files_outside_are_not_read(name: str, tmp_path: Path) -> None:
    """Tensors are in files of the checkpoint's directory, by their bare names."""
    places: Any = {MetadataIndex("embedding.x", torch.Size([0, 0]), 0): _StorageInfo(name, 0, 10)}
    with pytest.raises(ValueError, match="as a file name"):
        DistributedCheckpoint(write(tmp_path, metadata(storage_data=places)))


@pytest.mark.parametrize(
    "content",
    [
        None,
        {},
        [],
        Metadata,
        b"",
        b"no pickle",
        pickle.dumps(metadata())[:-20],
        metadata(storage_data=None),
        metadata(storage_data={"x": 1}),
        metadata(state_dict_metadata=[1]),
        metadata(state_dict_metadata={1: BytesStorageMetadata()}),
        metadata(state_dict_metadata={"embedding.x": TensorStorageMetadata(TensorProperties(), (2, 3), [])}),
        metadata(
            state_dict_metadata={"embedding.x": TensorStorageMetadata(TensorProperties(), torch.Size([1]), [None])}
        ),
        metadata(storage_meta=3),
    ],
    ids=repr,
)
def test_metadata_that_is_none(content: Any, tmp_path: Path) -> None:
    """Is told as damage, not by a traceback."""
    with pytest.raises(ValueError, match="is damaged"):
        DistributedCheckpoint(write(tmp_path, content))


@pytest.mark.parametrize("text", ["[]", "null", "3", '{"sharded_backend": {}}', "[" * 100_000, "\udcff"])
def test_format_file_of_another_kind(text: str, tmp_path: Path) -> None:
    """metadata.json may hold any JSON, or none."""
    write(tmp_path, metadata())
    (tmp_path / "metadata.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"is damaged|is a \{\} checkpoint"):
        DistributedCheckpoint(tmp_path)


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_torch_cannot_be_told_to_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD does not count where a checkpoint is read, and is there again afterwards."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save(_Evil(tmp_path / "mark"), tmp_path / "common.pt")
    with pytest.raises(ValueError, match="would run code"), code_refused(tmp_path):
        torch.load(tmp_path / "common.pt")
    assert not (tmp_path / "mark").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
