"""No damaged checkpoint is loaded, no file of one runs code, and no moment of a kill leaves one that counts."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megatron_fipo.atomic_file import write_atomically
from megatron_fipo.checkpoint import Checkpointer, files, writing
from tests.support.actors import actor_of, weights_of
from tests.support.checkpoint_runs import ASYNCHRONOUS, SYNCHRONOUS, differing
from tests.support.policies import make_qwen2
from tests.support.ranks import run_ranks
from tests.support.waiting import wait_until

pytestmark = pytest.mark.distributed

TWO: dict[str, Any] = {"parallel": {"world_size": 2}, "optimizer": {"distributed": True}}
ONE: dict[str, Any] = {"parallel": {"world_size": 1}}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("hf"), layers=2)


def _scale(actor: Any, factor: float) -> None:
    for chunk in actor.chunks:
        for parameter in chunk.parameters():
            parameter.data.mul_(factor)


# Damage


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def _half_delete(path: Path) -> None:
    for file in sorted(path.iterdir())[::2]:
        file.unlink()


def _another_steps_marker(path: Path) -> None:
    shutil.copy(path.parent / "step_1" / files.MARKER, path / files.MARKER)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut_off_data": (lambda p: _cut(p / "__1_0.distcp"), r"__1_0\.distcp has \d+ bytes instead of \d+"),
    "flipped_data": (lambda p: _flip(p / "__0_0.distcp"), r"__0_0\.distcp is not what was written"),
    "flipped_other_data": (lambda p: _flip(p / "__1_0.distcp"), r"__1_0\.distcp is not what was written"),
    "flipped_metadata": (lambda p: _flip(p / ".metadata"), r"\.metadata is not what was written"),
    "flipped_common": (lambda p: _flip(p / "common.pt"), r"common\.pt is not what was written"),
    "flipped_format": (lambda p: _flip(p / "metadata.json"), r"metadata\.json is not what was written"),
    "flipped_state": (lambda p: _flip(p / "state.json"), r"state\.json is not what was written"),
    "flipped_part": (lambda p: _flip(p / "replica_1.pt"), r"replica_1\.pt is not what was written"),
    "flipped_marker": (lambda p: _flip(p / files.MARKER), r"complete\.json (is|cannot)"),
    "deleted_data": (lambda p: (p / "__0_0.distcp").unlink(), r"__0_0\.distcp is missing"),
    "deleted_part": (lambda p: (p / "replica_0.pt").unlink(), r"replica_0\.pt is missing"),
    "deleted_marker": (lambda p: (p / files.MARKER).unlink(), r"complete\.json is missing"),
    "another_marker": (_another_steps_marker, r"complete\.json is of step 1"),
    "half_deleted": (_half_delete, "is missing"),
    "empty": (_empty, r"complete\.json is missing"),
}


def _damage_in_turn(path: Path, directory: Path) -> Any:
    """For each damage of step 2: what `newest` says with step 1 beside it, `load`, and `newest` with step 2 alone."""
    seen = {}
    with actor_of(path, **TWO) as actor:
        original = Checkpointer(directory / "original", SYNCHRONOUS, actor, actor.topology)
        original.save(1, {"n": 1}, part={"x": torch.ones(3)})
        _scale(actor, 2.0)
        original.save(2, {"n": 2}, part={"x": torch.ones(3)})
        for name, (damage, _) in DAMAGES.items():
            seen[name] = _look(actor, directory, name, damage)
    return seen


def _look(actor: Any, directory: Path, name: str, damage: Callable[[Path], None]) -> Any:
    warnings: list[str] = []
    checkpointer = Checkpointer(directory / name, SYNCHRONOUS, actor, actor.topology, warnings.append)
    if actor.topology.rank == 0:
        shutil.copytree(directory / "original", directory / name)
        damage(directory / name / "step_2")
    torch.distributed.barrier()
    newest = checkpointer.newest()
    with pytest.raises(ValueError, match="step_2 cannot be loaded: ") as refused:
        checkpointer.load(2)
    torch.distributed.barrier()
    if actor.topology.rank == 0:
        shutil.rmtree(directory / name / "step_1")
    torch.distributed.barrier()
    with pytest.raises(ValueError, match="no checkpoint of this run is whole") as none_whole:
        Checkpointer(directory / name, SYNCHRONOUS, actor, actor.topology).newest()
    return newest, warnings, str(refused.value), str(none_whole.value)


@pytest.fixture(scope="module")
def damaged(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_ranks(_damage_in_turn, 2, path, tmp_path_factory.mktemp("damaged"))


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(name: str, damaged: Any) -> None:
    """The newest whole checkpoint is the one before, a warning says why; the damaged one is refused on all ranks, by
    name and with the reason; with no other left, that is an error and not a fresh start."""
    reason = DAMAGES[name][1]
    for rank, results in enumerate(damaged):
        newest, warnings, refused, none_whole = results[name]
        assert newest == 1
        if rank == 0:
            (warning,) = warnings
            assert re.search(reason, warning)
            assert "step_2" in warning
        else:
            assert warnings == []
        assert re.search(reason, refused)
        assert re.search(reason, none_whole)
        assert "step_2" in none_whole


def _with_stray_files(path: Path, directory: Path) -> Any:
    warnings: list[str] = []
    with actor_of(path, **ONE) as actor:
        checkpointer = Checkpointer(directory, SYNCHRONOUS, actor, actor.topology, warnings.append)
        before = checkpointer.newest()
        saved = weights_of(actor)
        checkpointer.save(1, {"n": 1})
        _scale(actor, 2.0)
        (directory / "step_1" / "note.txt").write_text("mine")
        (directory / "step_1" / ".nfs0001").write_text("")
        (directory / "notes").mkdir()
        (directory / "step_2").write_text("a file")
        (directory / ".step_3.unfinished").mkdir()
        newest = checkpointer.newest()
        assert newest is not None
        state, parts = checkpointer.load(newest)
        return before, newest, state, parts, differing(weights_of(actor), saved), warnings


def test_stray_files_are_no_damage(path: Path, tmp_path: Path) -> None:
    """Nor is a directory that is not there, or a write that was not finished; what is whole loads."""
    (result,) = run_ranks(_with_stray_files, 1, path, tmp_path / "run")
    assert result == (None, 1, {"n": 1}, [None], [], [])
    assert not (tmp_path / "run" / ".step_3.unfinished").exists()


# Code in files


class _Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.file),))


def _save_evil_object(path: Path, directory: Path, file: Path) -> None:
    with actor_of(path, **ONE) as actor:
        (chunk,) = actor.chunks
        described = chunk.sharded_state_dict

        def with_evil_object(**kwargs: Any) -> Any:
            state = described(**kwargs)
            objects = [name for name in state if name.endswith("_extra_state")]
            assert objects
            for name in objects:
                state[name].data = _Evil(file)
            return state

        chunk.sharded_state_dict = with_evil_object
        Checkpointer(directory, SYNCHRONOUS, actor, actor.topology).save(1, {})


def _load_evil(path: Path, directory: Path) -> Any:
    outcomes = []
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    with actor_of(path, **ONE) as actor, contextlib.suppress(ValueError):
        checkpointer = Checkpointer(directory, SYNCHRONOUS, actor, actor.topology)
        checkpointer.load(1)
        outcomes.append("loaded")
    with (
        contextlib.suppress(ValueError),
        actor_of(path, **ONE, model={"megatron_path": str(directory / "step_1")}),
    ):
        outcomes.append("started")
    return outcomes


def test_objects_in_data_files_are_not_unpickled(path: Path, tmp_path: Path) -> None:
    """Torch would unpickle a module's state from a data file; nobody asks for it, and the weights still load."""
    run_ranks(_save_evil_object, 1, path, tmp_path / "run", tmp_path / "evil")
    assert run_ranks(_load_evil, 1, path, tmp_path / "run") == [["loaded", "started"]]
    assert not (tmp_path / "evil").exists()


def _save_one(path: Path, directory: Path) -> None:
    with actor_of(path, **ONE) as actor:
        Checkpointer(directory, SYNCHRONOUS, actor, actor.topology).save(1, {}, part={"x": 1})


@pytest.mark.parametrize("name", [files.METADATA, files.COMMON, "replica_0.pt"])
def test_pickled_code_is_refused(name: str, path: Path, tmp_path: Path) -> None:
    """Even in a file whose checksum is right, and where torch is told to run code in files."""
    run_ranks(_save_one, 1, path, tmp_path / "run")
    checkpoint = tmp_path / "run" / "step_1"
    if name == files.METADATA:
        (checkpoint / name).write_bytes(pickle.dumps(_Evil(tmp_path / "evil")))
    else:
        torch.save({"x": _Evil(tmp_path / "evil")}, checkpoint / name)
    marker = files.Marker.read(checkpoint, 1)
    marker.files[name] = files.record(checkpoint / name)
    (checkpoint / files.MARKER).write_text(marker.to_json())
    (outcomes,) = run_ranks(_load_evil, 1, path, tmp_path / "run")
    assert "loaded" not in outcomes
    assert not (tmp_path / "evil").exists()


# Kills


def _slow_items(seconds: float) -> None:
    original = writing._write_item

    def slow(*args: Any) -> Any:
        time.sleep(seconds)
        return original(*args)

    writing._write_item = slow


def _die_while_writing(path: Path, directory: Path) -> None:
    _slow_items(600.0)
    with actor_of(path, **TWO) as actor:
        checkpointer = Checkpointer(directory / "run", ASYNCHRONOUS, actor, actor.topology)
        checkpointer.save(1, {})
        (writer,) = (call.async_caller.process for call in checkpointer._queue.async_calls)
        (directory / f"writer_{actor.topology.rank}").write_text(str(writer.pid))
        torch.distributed.barrier()
        os.kill(os.getpid(), signal.SIGKILL)


def _gone(process: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    return True


def test_writers_die_with_their_ranks(path: Path, tmp_path: Path) -> None:
    """A writer that still had ten minutes to go is gone soon after its rank was killed."""
    with pytest.raises(RuntimeError, match="-9"):
        run_ranks(_die_while_writing, 2, path, tmp_path)
    writers = [int(file.read_text()) for file in tmp_path.glob("writer_*")]
    try:
        assert len(writers) == 2
        wait_until(lambda: all(map(_gone, writers)))
    finally:
        for writer in writers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(writer, signal.SIGKILL)


def _fail_while_writing(path: Path, directory: Path) -> None:
    _slow_items(600.0)
    with actor_of(path, **TWO) as actor:
        Checkpointer(directory, ASYNCHRONOUS, actor, actor.topology).save(1, {})
        raise ValueError("as training may")


def test_a_failed_rank_does_not_wait_for_its_writer(path: Path, tmp_path: Path) -> None:
    """An error ends the rank at once, though the checkpointer was not closed and its writer had ten minutes to go."""
    with pytest.raises(RuntimeError, match="as training may"):
        run_ranks(_fail_while_writing, 2, path, tmp_path)


def _save_until_killed(path: Path, directory: Path, delays: list[float]) -> None:
    """Save one checkpoint after the other, slowly written, and tell which are whole."""
    _slow_items(0.01)
    with actor_of(path, **TWO) as actor:
        rank = actor.topology.rank
        checkpointer = Checkpointer(directory / "run", ASYNCHRONOUS, actor, actor.topology)
        first = (checkpointer.newest() or 0) + 1
        threading.Timer(delays[rank], os.kill, (os.getpid(), signal.SIGKILL)).start()
        for step in range(first, first + 1000):
            checkpointer.save(step, {"n": step})
            while checkpointer.in_progress:
                time.sleep(0.01)
                checkpointer.poll()
            write_atomically(directory / f"whole_{rank}", str(step))


def _newest_loads(path: Path, directory: Path) -> Any:
    warnings: list[str] = []
    with actor_of(path, **TWO) as actor:
        checkpointer = Checkpointer(directory / "run", ASYNCHRONOUS, actor, actor.topology, warnings.append)
        step = checkpointer.newest()
        return step or 0, checkpointer.load(step)[0] if step else {"n": 0}, warnings


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills: int, path: Path, tmp_path: Path) -> None:
    """Both ranks die by SIGKILL while they save: nothing half counts, what was whole before still is, and the next
    start loads it."""
    moments = random.Random(kills)
    newest = 0
    for _ in range(kills):
        delay = moments.uniform(0.0, 1.5)
        with pytest.raises(RuntimeError):  # killed, or cut off by the other one's death
            run_ranks(_save_until_killed, 2, path, tmp_path, [delay, delay + moments.uniform(0.0, 0.05)])
        told = max((int(file.read_text()) for file in tmp_path.glob("whole_*")), default=0)
        results = run_ranks(_newest_loads, 2, path, tmp_path)
        earlier, newest = newest, results[0][0]
        assert newest in {max(told, earlier), max(told, earlier) + 1}  # the last may be whole before ranks are told
        assert results == [(newest, {"n": newest}, [])] * 2
