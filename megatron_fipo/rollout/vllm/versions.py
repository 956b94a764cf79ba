"""Names of weight versions on the servers, unique to a run."""

from __future__ import annotations

import secrets


def new_run() -> str:
    """Return a random name for a run's weights."""
    return secrets.token_hex(4)


def version_name(run: str, number: int) -> str:
    """Return the version name of a run's weights after `number` updates."""
    return f"{run}-{number}"


def number_of(name: str) -> int:
    """Return the number of updates in a version name."""
    return int(name.rpartition("-")[2])
