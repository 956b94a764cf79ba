"""Commands that are asked for their output."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fipo.machine.command import output_of


@pytest.mark.parametrize(
    ("script", "output", "error"),
    [
        ("#!/bin/sh\necho an answer", "an answer\n", None),
        ("#!/bin/sh\necho half; echo 'no answer' >&2; exit 3", "half\n", "`{}`: no answer"),
        ("#!/bin/sh\nexit 3", "", "`{}`: exit code 3"),
        ("#!/bin/sh\nkill -9 $$", "", "`{}`: exit code -9"),
        ("#!/bin/sh\nread line && echo $line; echo end", "end\n", None),  # there is no input to wait for
        ("#!/bin/sh\nprintf '\\377'", "\ufffd", None),
        ("no script", "", "`{}` cannot be started: Exec format error"),
    ],
)
def test_answers(script: str, output: str, error: str | None, tmp_path: Path) -> None:
    """The output comes back, with a message if the command failed; nothing is raised."""
    program = tmp_path / "program"
    program.write_text(script)
    program.chmod(0o755)
    assert output_of([str(program)], 60) == (output, error and error.format(program))


def test_a_command_that_does_not_answer(tmp_path: Path) -> None:
    """It is ended after its time; one that is not there cannot be started."""
    assert output_of(["/bin/sleep", "600"], 0.1) == ("", "`/bin/sleep 600` did not answer within 0 s")
    missing = str(tmp_path / "missing")
    assert output_of([missing], 60) == ("", f"`{missing}` cannot be started: No such file or directory")
