"""Telling a whole checkpoint from a damaged one, retention, and how tensors are cut into boxes."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.actor.checkpoint import boxes
from megatron_fipo.checkpoint import files, retention
from megatron_fipo.checkpoint.files import DamagedError, FileRecord, Marker
from megatron_fipo.config import CheckpointConfig

ONE = CheckpointConfig(keep_last=1, keep_every=0, keep_best=False)
MARKER = Marker(step=3, layout={"world": 2}, score=0.5, files={"a": FileRecord(1, 2)})


def _checkpoint(directory: Path, step: int, score: float | None = None) -> Path:
    """A whole checkpoint of one small file."""
    path = files.unfinished(directory, step)
    path.mkdir(parents=True)
    record = files.write(path / "data", b"0123456789")
    retention.publish(directory, Marker(step, {"world": 1}, score, {"data": record}))
    return files.directory_of(directory, step)


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4).flatmap(
        lambda shape: st.tuples(
            st.just(shape),
            st.lists(st.integers(0, math.prod(shape)), min_size=2, max_size=2).map(sorted),
        )
    )
)
def test_boxes_hold_a_flat_range(case: tuple[list[int], list[int]]) -> None:
    """Laid one behind the other, the boxes of any flat range of any tensor are that range; a matrix needs 3 at most."""
    shape, (start, stop) = case
    whole = torch.arange(math.prod(shape)).view(shape)
    cut = [
        whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))].flatten().tolist()
        for offsets, sizes in boxes(shape, start, stop)
    ]
    assert list(chain.from_iterable(cut)) == list(range(start, stop))
    assert len(cut) <= 2 * len(shape) - 1


def test_a_marker_is_read_as_written(tmp_path: Path) -> None:
    """Step, layout, score and files come back."""
    files.write(tmp_path / files.MARKER, MARKER.to_json().encode())
    assert Marker.read(tmp_path, 3) == MARKER


@pytest.mark.parametrize("bit", range(0, 8 * len(MARKER.to_json()) - 8, 37))  # the last byte is a newline
def test_a_flipped_bit_in_a_marker(bit: int, tmp_path: Path) -> None:
    """Wherever it is, the marker counts for nothing, or, in white space, for what it was."""
    content = bytearray(MARKER.to_json().encode())
    content[bit // 8] ^= 1 << bit % 8
    (tmp_path / files.MARKER).write_bytes(content)
    with contextlib.suppress(DamagedError):
        assert Marker.read(tmp_path, 3) == MARKER


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "complete.json is missing: it was not written to its end"),
        (b"", "complete.json cannot be read"),
        (b"[]", "complete.json cannot be read"),
        (b"{}", "complete.json cannot be read"),
        (MARKER.to_json().replace("0.5", "0.6").encode(), "complete.json is not what was written"),
        (replace(MARKER, step=4).to_json().encode(), "complete.json is of step 4"),
    ],
)
def test_what_is_no_marker(content: bytes | None, reason: str, tmp_path: Path) -> None:
    """Missing, empty, of another shape, altered, another step's: each is named."""
    if content is not None:
        (tmp_path / files.MARKER).write_bytes(content)
    with pytest.raises(DamagedError, match=reason):
        Marker.read(tmp_path, 3)


def test_damage_of_a_file(tmp_path: Path) -> None:
    """A file is cut off, altered, missing or not to be read as a file; a whole one is none of it."""
    path = _checkpoint(tmp_path, 1)
    expected = Marker.read(path, 1).files["data"]
    assert files.damage(path, "data", expected) is None
    (path / "data").write_bytes(b"012345678")
    assert files.damage(path, "data", expected) == "data has 9 bytes instead of 10"
    (path / "data").write_bytes(b"0123456798")
    assert files.damage(path, "data", expected) == "data is not what was written: its checksum differs"
    (path / "data").unlink()
    assert files.damage(path, "data", expected) == "data is missing"
    (path / "data").mkdir()
    assert "data" in (files.damage(path, "data", expected) or "")


def test_ranks_share_the_reading() -> None:
    """Every file is read by one rank, and no rank reads more than half a large file above its share."""
    records = {f"f{n}": FileRecord(size, 0) for n, size in enumerate([100, 90, 80, 30, 20, 10, 5, 0])}
    shares = [files.share(records, rank, 3) for rank in range(3)]
    assert sorted(chain.from_iterable(shares)) == sorted(records)
    loads = [sum(records[name].bytes for name in share) for share in shares]
    assert max(loads) <= sum(loads) / 3 + 10


@pytest.mark.parametrize(
    ("scores", "written", "config", "expected"),
    [
        ([1, 2, 3], 3, ONE, {3}),
        ([1, 2, 3], 3, replace(ONE, keep_last=2), {2, 3}),
        ([1, 2, 3], 3, replace(ONE, keep_last=9), {1, 2, 3}),
        ([5, 10, 15, 20, 22], 22, replace(ONE, keep_every=10), {10, 20, 22}),
        ([1, 2, 30], 2, ONE, {2, 30}),
        ({1: 0.5, 2: 0.9, 3: 0.1}, 3, replace(ONE, keep_best=True), {2, 3}),
        ({1: 0.5, 2: 0.9, 3: 0.1}, 3, ONE, {3}),
        ({1: 0.9, 2: 0.9, 3: 0.1}, 3, replace(ONE, keep_best=True), {2, 3}),
        ({1: 0.2, 2: None, 3: None}, 3, replace(ONE, keep_best=True), {1, 3}),
        ({1: None, 2: None}, 2, replace(ONE, keep_best=True), {2}),
    ],
)
def test_which_checkpoints_stay(
    scores: list[int] | dict[int, float | None], written: int, config: CheckpointConfig, expected: set[int]
) -> None:
    """The last ones, multiples, the best (the later of equals), always the newest, and the one just written."""
    by_step = scores if isinstance(scores, dict) else dict.fromkeys(scores)
    assert retention.kept(by_step, written, config) == expected


def test_a_checkpoint_goes_by_losing_its_name(tmp_path: Path) -> None:
    """A checkpoint loses its name before its first file is deleted; a damaged checkpoint is never deleted."""
    for step in (1, 2, 3):
        _checkpoint(tmp_path, step)
    (tmp_path / "step_1" / files.MARKER).unlink()
    old = retention.retire(tmp_path, ONE, 3)
    assert [path.name for path in old] == [".step_2.removed"]
    assert files.steps(tmp_path) == [3, 1]
    assert (old[0] / "data").read_bytes() == b"0123456789"
    retention.delete(old)
    assert sorted(os.listdir(tmp_path)) == ["step_1", "step_3"]


def test_publishing_replaces_a_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    """A run that went back to before a damaged checkpoint reaches its step again."""
    (_checkpoint(tmp_path, 1) / "data").write_bytes(b"damaged")
    _checkpoint(tmp_path, 1, score=2.0)
    path = tmp_path / "step_1"
    assert Marker.read(path, 1).score == 2.0
    assert (path / "data").read_bytes() == b"0123456789"


def test_an_interrupted_rename_is_finished(tmp_path: Path) -> None:
    """A run that died between marker and name had a whole checkpoint; one without a marker had not."""
    os.replace(_checkpoint(tmp_path, 4), tmp_path / ".step_4.unfinished")
    (tmp_path / ".step_5.unfinished").mkdir()
    retention.finish_interrupted(tmp_path)
    assert files.steps(tmp_path) == [4]
    assert Marker.read(tmp_path / "step_4", 4).step == 4
    assert list(files.leftovers(tmp_path, "unfinished", "removed")) == [tmp_path / ".step_5.unfinished"]


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    """Only directories called step_N count, newest first by number; a directory that is not there holds none."""
    for name in ("step_9", "step_10", "step_x", "step_", "astep_3", "step_3b", ".step_7.unfinished"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_11").write_text("a file")
    assert files.steps(tmp_path) == [10, 9]
    assert files.steps(tmp_path / "missing") == []


@pytest.mark.parametrize("late", ["step_3", "step_3/complete.json", "step_3/data"])
def test_what_another_node_wrote_comes_into_sight_later(
    late: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a network file system a checkpoint, or a file of it, that is not seen yet is waited for; it is no damage."""
    path, looked = _checkpoint(tmp_path, 3), threading.Event()
    (tmp_path / late).rename(tmp_path / "unseen")

    def listdir(directory: str | os.PathLike[str], list_directory: Any = os.listdir) -> list[str]:
        looked.set()
        return list_directory(directory)

    def appear() -> None:
        looked.wait()
        (tmp_path / "unseen").rename(tmp_path / late)

    monkeypatch.setattr(files, "is_network", lambda place: True)
    monkeypatch.setattr(os, "listdir", listdir)
    thread = threading.Thread(target=appear)
    thread.start()
    try:
        marker = Marker.read(path, 3)
        assert files.damage(path, "data", marker.files["data"]) is None
        assert looked.is_set()
    finally:
        looked.set()
        thread.join()


def test_what_is_missing_on_this_machine_is_missing_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a local file system, and on a network's after a minute, a file that is not there is damage."""
    path = _checkpoint(tmp_path, 3)
    marker = Marker.read(path, 3)
    (path / "data").unlink()
    monkeypatch.setattr(os, "listdir", lambda path: pytest.fail("a local file system was asked again"))
    assert files.damage(path, "data", marker.files["data"]) == "data is missing"
    monkeypatch.undo()
    monkeypatch.setattr(files, "is_network", lambda place: True)
    monkeypatch.setattr(files, "VISIBLE_SECONDS", 0.5)
    assert files.damage(path, "data", marker.files["data"]) == "data is missing"
