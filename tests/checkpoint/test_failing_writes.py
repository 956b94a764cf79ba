"""Writes that fail: disks that are full or refuse, writers that are killed or cannot start."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_fipo.checkpoint import retention
from tests.support.checkpoint_runs import run_of, update, write_slowly
from tests.support.policies import make_qwen2
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

VOCAB = 250
LIMIT = 100_000  # bytes; a rank's data file is larger


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("hf"), layers=2, vocab=VOCAB)


def _limit_file_size(limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def _listed(directory: Path) -> list[str]:
    """Return the files that are there. No rank continues before all have read them."""
    names = sorted(os.listdir(directory))
    dist.barrier()
    return names


def _save_on_a_full_disk(path: Path, directory: Path) -> Any:
    """Writes of rank 1 fail for a while."""
    with run_of(path, directory) as run:
        rank, seen = run.actor.topology.rank, []
        run.checkpointer.save(1, {}, wait=True)
        if rank == 1:
            _limit_file_size(LIMIT)
        run.checkpointer.save(2, {})
        run.poll_to_the_end()
        assert run.checkpointer.whole == 1
        seen.append(_listed(directory))
        update(run.actor, 0, VOCAB)
        with pytest.raises(OSError, match="could not be written") as error:
            run.checkpointer.save(3, {}, wait=True)
        seen.append(_listed(directory))
        newest = run.checkpointer.newest()
        if rank == 1:
            _limit_file_size(resource.RLIM_INFINITY)
        run.checkpointer.save(4, {})
        run.checkpointer.finish()
        assert run.checkpointer.whole == 4
        seen.append(_listed(directory))
        return seen, run.warnings, str(error.value), newest


def test_a_full_disk_does_not_end_the_run(path: Path, tmp_path: Path) -> None:
    """A failed write in the background is a warning that says what stays; one that was waited for is an error on all
    ranks; neither leaves anything behind, and the next write succeeds."""
    results = run_ranks(_save_on_a_full_disk, 2, path, tmp_path)
    for seen, _, error, newest in results:
        assert seen == [["step_1"], ["step_1"], ["step_1", "step_4"]]
        assert newest == 1
        assert (
            "the checkpoint of step 3 could not be written: File too large (rank 1); the one of step 1 stays" in error
        )
        assert "free space" in error
    (warning,) = results[0][1]
    assert "step 2 could not be written: File too large (rank 1); the one of step 1 stays. Training goes on" in warning
    assert results[1][1] == []


def _fail_at_the_end(path: Path, directory: Path) -> Any:
    with run_of(path, directory) as run:
        run.checkpointer.save(1, {})

        def full(*args: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        original, retention.publish = retention.publish, full
        with pytest.raises(OSError, match=r"No space left on device; there is no earlier one"):
            run.checkpointer.finish()
        left = _listed(directory)
        retention.publish = original
        return left, run.checkpointer.newest()


def test_a_disk_that_is_full_for_the_last_file(path: Path, tmp_path: Path) -> None:
    """Metadata and marker are rank 0's to write: all ranks learn that it could not, and nothing is left."""
    assert run_ranks(_fail_at_the_end, 2, path, tmp_path) == [([], None)] * 2


def _fail_twice(path: Path, directory: Path) -> tuple[int, str]:
    with run_of(path, directory) as run:

        def full(*args: Any) -> None:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        original, retention.publish = retention.publish, full
        try:
            run.checkpointer.save(1, {})
            run.checkpointer.save(2, {})  # brings the first one to its end
            warnings = len(run.warnings)
            with pytest.raises(OSError, match="step 2 could not be written") as error:
                run.checkpointer.save(3, {})
        finally:
            retention.publish = original
        return warnings, str(error.value)


def test_two_saves_that_fail(path: Path, tmp_path: Path) -> None:
    """The first is a warning, the second in a row ends the run, on all ranks, and names the quota first."""
    (warned, error), (_, other) = run_ranks(_fail_twice, 2, path, tmp_path)
    assert warned == 1
    assert error.startswith("the checkpoint of step 2 could not be written: Disk quota exceeded")
    assert other == error


def _cannot_fork(path: Path, directory: Path) -> Any:
    with run_of(path, directory) as run:
        if run.actor.topology.rank == 1:

            def no_memory(*args: Any) -> None:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

            run.checkpointer._queue.schedule_async_request = no_memory
        run.checkpointer.save(1, {})
        in_progress, left = run.checkpointer.in_progress, _listed(directory)
        run.checkpointer.save(2, {}, wait=True)
        return in_progress, left, run.warnings, run.checkpointer.newest()


def test_no_memory_for_a_writer(path: Path, tmp_path: Path) -> None:
    """One rank's fork fails: the others give up theirs, it is a warning, and a save without a fork still works."""
    results = run_ranks(_cannot_fork, 2, path, tmp_path)
    assert [(in_progress, left, newest) for in_progress, left, _, newest in results] == [(False, [], 2)] * 2
    assert "step 1 could not be written: its writer cannot be started: Cannot allocate memory" in results[0][2][0]


def _kill_the_writer(path: Path, directory: Path) -> Any:
    with run_of(path, directory) as run:
        if run.actor.topology.rank == 1:
            write_slowly(30.0)
        run.checkpointer.save(1, {})
        if run.actor.topology.rank == 1:
            run.checkpointer._queue.async_calls[0].async_caller.process.kill()
        run.poll_to_the_end()
        return run.warnings


def test_a_writer_that_is_killed(path: Path, tmp_path: Path) -> None:
    """A writer killed by the kernel, where memory is short, is a warning, and no checkpoint."""
    (warning,) = run_ranks(_kill_the_writer, 2, path, tmp_path)[0]
    assert "the process that wrote it was killed (rank 1)" in warning
    assert os.listdir(tmp_path) == []


def _save_where_one_cannot(path: Path, directory: Path) -> Any:
    with run_of(path, directory, parallel={"world_size": 1}) as run:
        run.checkpointer.save(1, {})
        with pytest.raises(OSError, match="step 2 could not be written") as error:
            run.checkpointer.save(2, {}, wait=True)
        return run.warnings, str(error.value)


def test_a_directory_that_cannot_be_made(path: Path, tmp_path: Path) -> None:
    """It is named, as a warning or as an error."""
    (tmp_path / "file").write_text("")
    (warning,), error = run_ranks(_save_where_one_cannot, 1, path, tmp_path / "file" / "checkpoints")[0]
    assert "Not a directory" in warning
    assert str(tmp_path / "file") in error


@contextlib.contextmanager
def _small_file_system(directory: Path, options: str) -> Iterator[None]:
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], capture_output=True, text=True
    )
    if mount.returncode != 0:
        pytest.skip(f"no file system of its own: {mount.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.mark.parametrize(
    ("options", "reason"), [("size=300k", "No space left on device"), ("ro", "Read-only file system")]
)
def test_a_real_disk_that_refuses(options: str, reason: str, path: Path, tmp_path: Path) -> None:
    """A file system that is full, and one that is read-only, are named; nothing stays on the full one."""
    with _small_file_system(tmp_path, options):
        (warning,), error = run_ranks(_save_where_one_cannot, 1, path, tmp_path)[0]
        assert reason in warning
        assert reason in error
        assert os.listdir(tmp_path) == []
