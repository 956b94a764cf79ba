"""A signal to one rank is seen by all of them at the same point."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.parallel import interrupt
from megatron_fipo.parallel.interrupt import Interrupted
from tests.support.ranks import context, fork, run_ranks
from tests.support.waiting import PATIENCE

pytestmark = pytest.mark.distributed


def _phases(signalled: int, number: int) -> list[str]:
    """Three phases, in the second of which one rank is signalled while the other works on."""
    interrupt.install()
    seen = []
    for phase in range(3):

        def work(phase: int = phase) -> str:
            if phase == 1 and dist.get_rank() == signalled:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # Slurm signals whole containers, and so does a supervisor
                if interrupt.requested():
                    raise Interrupted
            time.sleep(0.05)
            return f"phase {phase}"

        try:
            seen.append(interrupt.unless_interrupted(work))
        except Interrupted:
            seen.append("interrupted")
            break
    return [*seen, f"asked: {interrupt.requested()}", f"agreed: {interrupt.agreed()}"]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_all_ranks_stop_in_the_same_phase(number: int) -> None:
    """Rank 1 is asked; rank 0, which was not, finishes its work and then stops, too."""
    asked, other = run_ranks(_phases, 2, 0, number)
    assert asked == ["phase 0", "interrupted", "asked: True", "agreed: True"]
    assert other == ["phase 0", "interrupted", "asked: False", "agreed: True"]


def _never_asked() -> tuple[bool, bool, str]:
    interrupt.install()
    return interrupt.requested(), interrupt.agreed(), interrupt.unless_interrupted(lambda: "done")


def test_nobody_asked() -> None:
    """Without a signal the work's result comes back."""
    assert run_ranks(_never_asked, 2) == [(False, False, "done")] * 2


def _on_a_machine_with_gpus() -> bool:
    interrupt.install()
    torch.cuda.is_available = lambda: True  # type: ignore[method-assign]
    return interrupt.agreed()


def test_ranks_wait_for_each_other_on_the_cpu() -> None:
    """Where there are GPUs as well: a wait for those that still generate is gloo's, and keeps no GPU busy."""
    assert run_ranks(_on_a_machine_with_gpus, 2) == [False, False]


def _signalled_while_noting() -> bool:
    interrupt.install()

    def signal_again(frame: FrameType, event: str, argument: object) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return signal_again

    sys.settrace(signal_again)  # called for every line that the handler runs
    os.kill(os.getpid(), signal.SIGUSR1)
    sys.settrace(None)
    return interrupt.requested()


def test_a_signal_while_another_is_noted() -> None:
    """Comes to no harm: Slurm's and the supervisor's may be microseconds apart."""
    assert run_ranks(_signalled_while_noting, 1) == [True]


def _start_a_child_and_be_signalled() -> tuple[bool, int | None]:
    interrupt.install()
    with interrupt.shielded():
        child = subprocess.Popen(["sleep", "60"])
        os.kill(os.getpid(), signal.SIGUSR1)
    for number in interrupt.SIGNALS:
        os.kill(child.pid, number)
    time.sleep(0.3)
    ended = child.poll()
    child.kill()
    child.wait()
    return interrupt.requested(), ended


def test_shielded_children() -> None:
    """A signal to everybody does not end a process that a rank has started, and reaches the rank all the same."""
    assert run_ranks(_start_a_child_and_be_signalled, 1) == [(True, None)]


def _signalled_while_it_starts(seen: Any) -> None:
    with interrupt.shielded():
        rank = os.fork()
        if rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            before = interrupt.requested()
            interrupt.install()
            seen.send((before, interrupt.requested()))
            os._exit(0)
    os.waitpid(rank, 0)


def test_a_signal_that_was_held_back() -> None:
    """While a rank is started the signals are blocked, for all of its threads; one that came then is a request."""
    received, seen = context.Pipe(duplex=False)
    process = fork(_signalled_while_it_starts, seen)
    try:
        assert received.poll(PATIENCE)
        assert received.recv() == (False, True)
    finally:
        process.kill()
        process.join()
