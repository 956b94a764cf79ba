"""Kernel limits of a process, which Slurm copies from the shell in which a job was submitted."""

from __future__ import annotations

import errno
import os
import resource

_NAMES = {resource.RLIMIT_NOFILE: "open files (ulimit -n)", resource.RLIMIT_NPROC: "processes (ulimit -u)"}
_OTHER_FILES = 256  # libraries, logs, pipes, devices
_FILES_PER_SERVER = 6  # probe, abort request, idle connections
_RESERVE = 128  # files that may be opened later, other than connections of the rollout client
_TOO_MANY = (errno.EMFILE, errno.ENFILE)


def raise_limits() -> dict[str, tuple[int, int]]:
    """Raise the soft limits of open files and processes to the hard ones; return what was raised: (from, to)."""
    raised: dict[str, tuple[int, int]] = {}
    for number, name in _NAMES.items():
        soft, hard = resource.getrlimit(number)
        if soft == hard:
            continue
        try:
            resource.setrlimit(number, (hard, hard))
        except (ValueError, OSError):  # some kernels have a bound below the hard limit
            continue
        raised[name] = (soft, hard)
    return raised


def open_files() -> int | None:
    """Return the maximum number of open files of this process; None: no limit."""
    return _finite(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def most_open_files() -> int | None:
    """Return the maximum number of open files of this process after `raise_limits`; None: no limit."""
    return _finite(resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def open_files_needed(requests: int, servers: int, ranks: int) -> int:
    """Return the number of open files of the rank with the most connections.

    Args:
        requests: pending requests of that rank, each with its own connection.
        servers: rollout servers, to which it also has other connections.
        ranks: world size; a process group has a connection to each of its members.
    """
    return requests + _FILES_PER_SERVER * servers + 4 * ranks + _OTHER_FILES


def open_files_problem(needed: int) -> str | None:
    """Return an error message if even a raised limit does not allow `needed` open files; None if it does."""
    most = most_open_files()
    if most is None or most >= needed:
        return None
    return (
        f"the limit of open files is {most} (`ulimit -Hn`), but a rank of this configuration opens up to {needed}: "
        "raise it (limits.conf, LimitNOFILE of slurmd), or lower rollout.server.max_num_seqs or "
        "rollout.prompts_per_round"
    )


def connections_at_most(servers: int) -> int:
    """Return the number of connections for requests that this process can still open; at least 1."""
    limit = open_files()
    if limit is None:
        limit = 1 << 20
    return max(1, limit - len(os.listdir("/proc/self/fd")) - _FILES_PER_SERVER * servers - _RESERVE)


def is_out_of_files(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, says that no more files can be opened."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        if isinstance(error, OSError) and error.errno in _TOO_MANY:
            return True
        if isinstance(error, BaseExceptionGroup) and any(is_out_of_files(part) for part in error.exceptions):
            return True
        seen.append(error)
        error = error.__cause__ or error.__context__
    return False


def _finite(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit
