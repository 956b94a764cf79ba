"""Text of files and models on a terminal: nothing of it is obeyed."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fipo.config import Config
from megatron_fipo.evaluation import Evaluation
from megatron_fipo.printable import printable
from megatron_fipo.report.parts import terminal_text
from megatron_fipo.run_log import RunLog


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, ±1 and 数学\n", "plain, ±1 and 数学\n"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("a\tb\rc\x00", r"a b\rc\x00"),
        ("\x9b1m\u202eright", r"\x9b1m\u202eright"),
        ("half \ud800", r"half \ud800"),
        (ValueError("\x07"), r"\x07"),
    ],
)
def test_control_characters_are_named(text: object, shown: str) -> None:
    """Control characters are shown as Python writes them; a tab is a space, and line feeds stay."""
    assert printable(text) == shown


def test_tables_of_the_terminal() -> None:
    """A name in a table cannot color, clear or overwrite it."""
    assert terminal_text("a\x1b[2Jb [bold]c[/] \x85d") == r"a\x1b[2Jb [bold]c[/] \x85d"


@pytest.mark.parametrize("name", ["/data/[/x]", "[red]", "[/]", "[link=x]a", "\x1b[31m", "a\\[b]"])
def test_names_are_no_markup(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets in a path neither style a line nor end the run with an error of the console's."""
    log = RunLog(Config(), rank=0, enabled=False)
    log.note(name)
    log.warn(name)
    assert capsys.readouterr().out == f"{printable(name)}\nwarning: {printable(name)}\n"


def test_markup_in_the_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The path is shown as it is."""
    RunLog(Config(), rank=0, enabled=False).warn(f"{tmp_path}[/bold]/x")
    assert f"{tmp_path}[/bold]/x" in capsys.readouterr().out


def test_interval_of_a_score(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets around its ends are shown as they are."""
    result = Evaluation(8, 23, 0.333, 0.35, 0.6, 9.0, 0.0, intervals={"avg@k": (0.278, 0.391)})
    RunLog(Config(), rank=0, enabled=False).evaluation(5, result)
    assert capsys.readouterr().out.startswith("eval at step 5: avg@8 0.333  [0.278, 0.391]  cons@8 0.350  pass@8 0.600")
