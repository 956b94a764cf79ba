"""Commands that are asked for something: their output, or a message that says why there is none."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

_STDERR_CHARACTERS = 500


def output_of(command: Sequence[str], seconds: float) -> tuple[str, str | None]:
    """Run a command; return its standard output, and an error message or None.

    The message says how it failed: it could not be started, did not end within `seconds`, or ended with another exit
    code than 0.
    """
    text = " ".join(command)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return "", f"`{text}` did not answer within {seconds:.0f} s"
    except OSError as error:
        return "", f"`{text}` cannot be started: {error.strerror}"
    if done.returncode:
        reason = done.stderr.strip()[-_STDERR_CHARACTERS:] or f"exit code {done.returncode}"
        return done.stdout, f"`{text}`: {reason}"
    return done.stdout, None
