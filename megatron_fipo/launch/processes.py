"""Processes that this one starts: ranks, and the checks that come before them.

Without a GPU they are forked from one server that has imported the heavy packages once. CUDA does not survive a fork:
with a GPU every process is spawned.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any, ParamSpec, TypeVar

from megatron_fipo.launch import child
from megatron_fipo.machine import gpus

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)  # forwarded to ranks

_P = ParamSpec("_P")
_T = TypeVar("_T")


def start_method() -> str:
    """Return multiprocessing's start method."""
    return "spawn" if gpus.has_gpu() else "forkserver"


def context() -> Any:
    """Return multiprocessing's context of ranks."""
    multiprocessing.set_forkserver_preload(["megatron_fipo.launch.preload"])
    return multiprocessing.get_context(start_method())


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block the signals while processes are started inside.

    Slurm signals every process of a job, which would kill the fork server and Python's resource tracker. A rank
    unblocks them when it is ready, and then receives those that came meanwhile.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # which unblocks some of them in this process
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def call(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Return `function(*args, **kwargs)`, called in a process of its own, with which ends what it has imported.

    Raises:
        ValueError: the function raised one.
        RuntimeError: it raised something else, with its traceback, or its process was killed.
    """
    started_by = context()
    receiving, sending = started_by.Pipe(duplex=False)
    with signals_blocked():
        process = started_by.Process(target=_answer, args=(sending, function, args, kwargs), name=function.__name__)
        process.start()
    sending.close()
    try:
        result, refused, failed = receiving.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process of {function.__name__} ended with exit code {process.exitcode}") from None
    finally:
        end(process)
    if failed is not None:
        raise RuntimeError(f"{function.__name__} failed:\n{failed}")
    if refused is not None:
        raise ValueError(refused)
    return result


def _answer(sending: Connection, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
    child.lead_process_group()
    child.die_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    answer: tuple[Any, str | None, str | None]
    try:
        answer = (function(*args, **kwargs), None, None)
    except ValueError as error:
        answer = (None, str(error), None)
    except BaseException:
        answer = (None, None, traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    sending.send(answer)


def end(process: Any) -> None:
    """Kill a process that leads a group, and its child processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have had its group yet
    process.join()
