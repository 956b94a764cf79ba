"""Failures are sorted into what the user mends, what would happen again, and what another attempt may be spared."""

from __future__ import annotations

import errno
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.exit_codes import MachineFailure
from megatron_fipo.launch.failure import Failure, Kind, kind_of, of_exit


class _OwnValueError(ValueError):
    pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("mend this"), "input"),
        (_OwnValueError("a library's"), "program"),
        (RuntimeError("shapes do not match"), "program"),
        (KeyError("x"), "program"),
        (torch.OutOfMemoryError("CUDA out of memory"), "program"),
        (MemoryError(), "program"),
        (OSError(errno.ENOSPC, "No space left on device"), "program"),
        (FileNotFoundError(errno.ENOENT, "no such file"), "program"),
        (OSError(errno.EIO, "Input/output error"), "machine"),
        (OSError(errno.ESTALE, "Stale file handle"), "machine"),
        (OSError(errno.ESHUTDOWN, "Cannot send after transport endpoint shutdown"), "machine"),  # Lustre
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "program"),
        (MachineFailure("no server took weights"), "machine"),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "machine"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "machine"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "connection"),
        (dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp"), "connection"),
        (dist.DistStoreError("wait timeout after 1000ms"), "connection"),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), "connection"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [10.0.0.1]:4711"), "connection"),
        (RuntimeError("[gloo/unbound_buffer.cc:78] Timed out waiting 6000ms for recv operation"), "connection"),
    ],
)
def test_kinds_of_errors(error: BaseException, kind: Kind) -> None:
    """By the types of Python and torch, and by what gloo and CUDA say."""
    assert kind_of(error) == kind


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (-signal.SIGKILL, "machine", "it was ended by SIGKILL, which is how a machine out of memory ends processes"),
        (-signal.SIGSEGV, "machine", "it was ended by SIGSEGV"),
        (-signal.SIGABRT, "connection", "it was ended by SIGABRT"),  # NCCL's watchdog
        (3, "program", "it ended with exit code 3"),
    ],
)
def test_ends_without_an_exception(code: int, kind: Kind, says: str) -> None:
    """The signal is named."""
    failure = of_exit(4, code)
    assert (failure.rank, failure.kind, failure.message) == (4, kind, says)


def test_a_failure_travels(tmp_path: Path) -> None:
    """From the rank's process to its supervisor, by a file."""
    failure = Failure(3, "node1", "program", "RuntimeError: boom", "Traceback\n  boom\n", ("node1",))
    failure.write(tmp_path / "rank_3.json")
    assert Failure.read(tmp_path / "rank_3.json") == failure
    assert [f.name for f in tmp_path.iterdir()] == ["rank_3.json"]
