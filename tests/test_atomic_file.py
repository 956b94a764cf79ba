"""Files that are replaced atomically, and read back."""

from __future__ import annotations

import os
import socket
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_fipo.atomic_file import atomic_file, read_json, time_in, write_atomically, write_table


def test_a_failing_block_leaves_what_was_there(tmp_path: Path) -> None:
    """Neither the half-written file nor a temporary one stays."""
    path = tmp_path / "x.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError), atomic_file(path) as temporary:
        temporary.write_text("new \u03b5", encoding="ascii")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert path.read_text() == "old"


def test_the_file_is_replaced_when_the_block_ends(tmp_path: Path) -> None:
    """Until then readers see the old one, and no name that a glob for the kind of file finds."""
    path = tmp_path / "x.json"
    write_atomically(path, b"old")
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert list(tmp_path.glob("*.json")) == [path]
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_links_in_the_way_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's temporary name cannot be guessed; where one is there already, as a link for example, it is not used."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    names = set()
    for _ in range(50):
        with atomic_file(tmp_path / "x.json") as temporary:
            names.add(temporary.name)
    assert len(names) == 50
    monkeypatch.setattr("secrets.token_hex", lambda size: "guessed")
    for link in (tmp_path / ".x.json.guessed", tmp_path / f".x.json.{socket.gethostname()}.{os.getpid()}"):
        link.symlink_to(precious)
        with pytest.raises(FileExistsError):
            write_atomically(tmp_path / "x.json", "new")
    assert precious.read_text() == "mine"
    assert (tmp_path / ".x.json.guessed").is_symlink()


def test_table(tmp_path: Path) -> None:
    """Its directory is made, and what is read is what was written."""
    table = pa.table({"a": [1, 2], "b": [["x"], []]})
    write_table(table, tmp_path / "new" / "t.parquet")
    assert pq.read_table(tmp_path / "new" / "t.parquet").equals(table)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, "\udcff"])
def test_damaged_objects_are_named(tmp_path: Path, text: str) -> None:
    """Whatever else than a JSON object is in the file."""
    (tmp_path / "x.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"x\.json cannot be read: "):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}


@pytest.mark.parametrize("value", [None, 3, "", "yesterday", [1]])
def test_times_that_are_none_are_named(tmp_path: Path, value: object) -> None:
    """A time is read as it is written."""
    with pytest.raises(ValueError, match=r"x\.json cannot be read: .* is not a time"):
        time_in(tmp_path / "x.json", value)
    assert time_in(tmp_path / "x.json", "2026-01-02T03:04:05") == datetime(2026, 1, 2, 3, 4, 5)
