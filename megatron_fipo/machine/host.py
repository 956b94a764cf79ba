"""Name of this node."""

from __future__ import annotations

import os
import socket


def host() -> str:
    """Return Slurm's name of this node, or its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
