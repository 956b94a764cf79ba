"""Limits that the kernel sets for a process, which Slurm copies from the shell in which a job was submitted."""

from __future__ import annotations

import errno
import os
import resource

_NAMES = {resource.RLIMIT_NOFILE: "open files (ulimit -n)", resource.RLIMIT_NPROC: "processes (ulimit -u)"}
_OTHER_FILES = 256  # libraries, logs, pipes, devices
_FILES_A_SERVER = 6  # probe, order to abort, idle connections
_RESERVE = 128  # open files that are not connections of the rollout client and may still come
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
        except (ValueError, OSError):  # some kernels know a lower bound than the hard limit
            continue
        raised[name] = (soft, hard)
    return raised


def open_files() -> int | None:
    """Return how many files this process may have open; None: no limit."""
    return _finite(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def most_open_files() -> int | None:
    """Return how many files this process may have open after `raise_limits`; None: no limit."""
    return _finite(resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def open_files_needed(requests: int, servers: int, ranks: int) -> int:
    """Return how many files the rank with the most connections has open.

    Args:
        requests: responses that it has in flight, each with its own connection.
        servers: rollout servers, to which it has connections beside those of requests.
        ranks: of the world; each process group has a connection to each of its members.
    """
    return requests + _FILES_A_SERVER * servers + 4 * ranks + _OTHER_FILES


def open_files_problem(needed: int) -> str | None:
    """Return what is wrong where this process can never open `needed` files; None if it can."""
    most = most_open_files()
    if most is None or most >= needed:
        return None
    return (
        f"the limit of open files is {most} (`ulimit -Hn`), but a rank of this configuration opens up to {needed}: "
        "raise it (limits.conf, LimitNOFILE of slurmd), or lower rollout.server.max_num_seqs or "
        "rollout.prompts_per_round"
    )


def connections_at_most(servers: int) -> int:
    """Return how many connections for requests fit into what this process may still open; at least 1."""
    limit = open_files()
    if limit is None:
        limit = 1 << 20
    return max(1, limit - len(os.listdir("/proc/self/fd")) - _FILES_A_SERVER * servers - _RESERVE)


def is_out_of_files(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, says that no more files can be opened here."""
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
