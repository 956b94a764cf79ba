"""Failure of a rank, as it is reported to the supervisor, and its kind."""

from __future__ import annotations

import errno
import json
import re
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_fipo.atomic_file import write_atomically
from megatron_fipo.exit_codes import MachineFailure
from megatron_fipo.machine.host import host

# input: a ValueError, a user error. program: any other exception; it would occur again. machine: a node, a device or a
# disk; another attempt may succeed. connection: one of these, or the mere consequence of another rank's failure.
Kind = Literal["input", "program", "machine", "connection"]

_CONNECTION = re.compile(
    r"gloo[/:]|Connection (closed|reset|refused)|Socket Timeout|Broken pipe|Timed out waiting|NCCL", re.IGNORECASE
)
_DEVICE = re.compile(r"CUDA error|CUBLAS_STATUS|CUDNN_STATUS|uncorrectable ECC", re.IGNORECASE)
_MACHINE_ERRORS = {
    *(errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ESHUTDOWN),
    *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ETIMEDOUT),
}


@dataclass(frozen=True)
class Failure:
    """Failure of a rank; `blamed`: nodes that the next attempt should avoid."""

    rank: int
    host: str
    kind: Kind
    message: str  # "RuntimeError: what happened"
    traceback: str = ""
    blamed: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        return f"rank {self.rank} on {self.host} failed first: {self.message}"

    def write(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self)))

    @staticmethod
    def read(path: Path) -> Failure:
        fields = json.loads(path.read_text())
        return Failure(**{**fields, "blamed": tuple(fields["blamed"])})


def of_exit(rank: int, exit_code: int) -> Failure:
    """Return the failure of a rank that ended without an exception."""
    if exit_code >= 0:
        return Failure(rank, host(), "program", f"it ended with exit code {exit_code}")
    number = signal.Signals(-exit_code)
    # NCCL's watchdog aborts the process when a peer is gone or a collective takes too long.
    kind: Kind = "connection" if number == signal.SIGABRT else "machine"
    hint = ", which is how a machine out of memory ends processes" if number == signal.SIGKILL else ""
    return Failure(rank, host(), kind, f"it was ended by {number.name}{hint}")


def kind_of(error: BaseException) -> Kind:
    """Return the kind of an error, from its type or else from the message of a library's RuntimeError."""
    names = {c.__name__ for c in type(error).__mro__}
    if type(error) is ValueError:
        return "input"
    if isinstance(error, MachineFailure):
        return "machine"
    if "OutOfMemoryError" in names:
        return "program"
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:  # ESHUTDOWN is a ConnectionError as well
        return "machine"
    if isinstance(error, ConnectionError) or "DistError" in names:
        return "connection"
    if isinstance(error, OSError):
        return "program"
    if "AcceleratorError" in names:
        return "machine"
    if isinstance(error, RuntimeError) and _CONNECTION.search(str(error)):
        return "connection"
    return "machine" if isinstance(error, RuntimeError) and _DEVICE.search(str(error)) else "program"
