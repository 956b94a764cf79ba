"""install.sh where there is a browser, and where there is none yet."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("install.sh")
BASH = shutil.which("bash") or "/bin/bash"


def _program(path: Path, body: str = "") -> None:
    path.write_text(f"#!{BASH}\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("name", ["chromium", "chromium-browser", "google-chrome", None])
def test_installs_what_is_missing(name: str | None, tmp_path: Path) -> None:
    log = tmp_path / "log"
    for program in ("python", "apt-get"):
        _program(tmp_path / program, f'echo {program} "$@" >> {log}')
    _program(tmp_path / "env", 'shift; exec "$@"')
    _program(tmp_path / "id", "echo 0")
    if name is not None:
        _program(tmp_path / name)
    subprocess.run([BASH, SCRIPT, "python"], env={"PATH": str(tmp_path)}, check=True)
    called = log.read_text()
    assert ("apt-get install" in called) == (name is None)
    assert ("playwright install" in called) == (name is None)  # apt-get is said to work, but there is none yet


def test_says_loudly_that_tests_are_skipped(tmp_path: Path) -> None:
    _program(tmp_path / "python", "exit 1")
    _program(tmp_path / "id", "echo 0")
    _program(tmp_path / "cat", f"exec {shutil.which('cat')}")
    ended = subprocess.run([BASH, SCRIPT, "python"], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert "TESTS OF THE HTML PAGES ARE BEING SKIPPED" in ended.stderr
