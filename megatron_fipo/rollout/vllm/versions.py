"""Names of weight versions on the servers: unlike those of any other run, so that nobody's weights pass for ours."""

from __future__ import annotations

import secrets


def new_run() -> str:
    return secrets.token_hex(4)


def version_name(run: str, number: int) -> str:
    return f"{run}-{number}"


def number_of(name: str) -> int:
    return int(name.rpartition("-")[2])
