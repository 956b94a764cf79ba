"""Process group of a started process, and its end together with the process that started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def lead_process_group() -> None:
    """Leave the parent's process group: Ctrl-C goes to the parent alone, which can end this group as a whole."""
    os.setpgid(0, 0)


def die_with_parent() -> None:
    """Kill this process's group when the process that started it dies, even by SIGKILL.

    The kernel's parent-death signal does not help: the parent is the fork server, which lives as long as any rank.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, name="die-with-parent", daemon=True).start()
