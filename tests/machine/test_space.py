"""Room for checkpoints: the file system's and the quotas', compared with what a run will write."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from megatron_fipo.checkpoint import files
from megatron_fipo.machine import space
from megatron_fipo.machine.space import Room
from megatron_fipo.scaling.planner import checkpoint_space as needs
from tests.support.policies import make_config

Disk = namedtuple("Disk", ["total", "used", "free"])
USER = "{}  600  1000  2000  0  5  0  0  0"
LFS = "     {}  600*  0  900  -  10  0  0  -"


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with programs, alone on the PATH; the file system has 10 MiB left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(2**40, 2**39, 10 * 2**20))
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def _program(directory: Path, name: str, user: str, group: str = "") -> None:
    script = directory / name
    script.write_text(f"#!/bin/sh\ncase \"$*\" in *-u*) echo '{user}';; *-g*) echo '{group}';; esac\n")
    script.chmod(0o755)


def test_without_quotas(tools: Path) -> None:
    """Free space is that of the file system of the first directory that exists."""
    assert space.room(tools / "not" / "yet") == Room(10 * 2**20, "the file system")


def test_quotas(tools: Path) -> None:
    """The lower of soft and hard limit counts, of the user and the group, on the directory's own file system."""
    _program(tools, "df", "", "")
    (tools / "df").write_text("#!/bin/sh\necho Filesystem\necho 'server:/home 1 1 1 1% /home'\n")
    _program(tools, "quota", USER.format("server:/home"))
    assert space.room(tools) == Room(400 * 1024, "the user quota of server:/home")
    _program(tools, "quota", USER.format("server:/other"))
    assert space.room(tools).limit == "the file system"
    _program(tools, "lfs", LFS.format("/lustre"), LFS.format("/lustre").replace("900", "700"))
    assert space.room(tools) == Room(100 * 1024, "the group quota of /lustre")


def test_checkpoints_that_will_be_there() -> None:
    """Space is needed for the kept checkpoints and one that is being written; never for more than are written."""
    config = make_config(
        "unused", checkpoint={"keep_last": 2, "keep_every": 20, "every": 5}, trainer={"max_steps": 100}
    )
    assert needs.num_checkpoints(config) == 2 + 100 // 20 + 1
    config = make_config("unused", checkpoint={"keep_last": 5, "every": 0}, trainer={"max_steps": 100})
    assert needs.num_checkpoints(config) == 3


@pytest.mark.parametrize(("free", "refused", "warned"), [(27, True, False), (29, False, True), (43, False, False)])
def test_room_for_checkpoints(
    free: int, refused: bool, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints of 14 GB, up to three: too little for two is refused, too little for all is a warning; what earlier
    checkpoints take counts as room."""
    monkeypatch.setattr(needs, "model_of", lambda config: None)
    monkeypatch.setattr(needs, "parameters", lambda model: 10**9)
    monkeypatch.setattr(needs, "room", lambda path: Room(free * 10**9 - 1000, "the user quota of /home"))
    old = tmp_path / "run" / "checkpoints" / "step_1" / "x"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"x" * 1000)
    run = {"directory": str(tmp_path / "run")}
    config = make_config("unused", run=run, model={"dtype": "bfloat16"}, checkpoint={"keep_last": 2, "every": 5})
    if refused:
        with pytest.raises(
            ValueError, match=r"a checkpoint takes 14.0 GB, .* left by the user quota of /home: at least two"
        ):
            needs.check_space(config)
        return
    warnings = needs.check_space(config)
    assert len(warnings) == warned
    assert all("keep up to 2 checkpoints, plus one" in warning for warning in warnings)


def test_a_file_that_another_node_has_just_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network file system it is waited for; elsewhere, and in the end, it is missing."""
    monkeypatch.setattr(files, "is_network", lambda path: True)
    path, listed = tmp_path / "x", []
    record = files.write(tmp_path / "y", b"content")

    def appears(seconds: float) -> None:
        listed.append(seconds)
        path.write_bytes(b"content")

    monkeypatch.setattr(files.time, "sleep", appears)
    assert files.damage(tmp_path, "x", record) is None
    assert len(listed) == 1
    monkeypatch.setattr(files, "VISIBLE_SECONDS", 0.0)
    assert files.damage(tmp_path, "z", record) == "z is missing"
    monkeypatch.setattr(files, "is_network", lambda path: False)
    assert files.damage(tmp_path, "z", record) == "z is missing"


def test_which_file_systems_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the longest mount point above the directory."""
    mounts = f"d / ext4 rw 0 0\ns:/x {tmp_path} nfs4 rw 0 0\nt {tmp_path}/local tmpfs rw 0 0\n"
    monkeypatch.setattr(space.Path, "read_text", lambda self: mounts)
    assert space.is_network(tmp_path / "run")
    (tmp_path / "local").mkdir()
    assert not space.is_network(tmp_path / "local" / "run")
    assert not space.is_network(Path("/etc"))


def test_directories_that_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EINVAL is passed over for a directory, and is an error for a file."""

    def refuse(descriptor: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(files.os, "fsync", refuse)
    files.flush(tmp_path)
    (tmp_path / "x").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        files.flush(tmp_path / "x")
