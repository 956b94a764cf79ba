"""Shell blocks of the documentation: each is run, or says why not; every `megatron-fipo` command in them parses."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.commands import commands, parse
from tests.support.markdown import NAMES, ROOT, Block, blocks, prose

LANGUAGES = {"bash", "python", "text", "yaml"}
SHELL = [block for page in NAMES for block in blocks(page) if block.language == "bash"]
RUN = sorted({block.page for block in SHELL if block.not_run is None})
SECONDS = 3600  # of a page, also on a busy machine


def _name(block: Block) -> str:
    return f"{block.page}:{block.line}"


@pytest.mark.parametrize("page", NAMES)
def test_every_fence_has_a_known_language(page: str) -> None:
    """So that no shell block escapes the tests below under another name, nor by a fence that is not recognized."""
    text = (ROOT / page).read_text()
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(blocks(page))
    assert {block.language for block in blocks(page)} <= LANGUAGES
    assert not re.search(r"\n\n    \S", "\n" + prose(page)), "an indented code block has no language"


@pytest.mark.parametrize("block", [block for block in SHELL if block.not_run is not None], ids=_name)
def test_reason_for_not_running(block: Block) -> None:
    """A block that is not run says why, in more than a word."""
    assert len((block.not_run or "").split()) >= 3


def test_which_pages_are_run() -> None:
    """These; a page with a new block that is not marked is run, too, and belongs in this list."""
    assert RUN == ["docs/pipelines.md", "docs/scaling.md", "docs/tutorial.md"]


@pytest.mark.parametrize("block", SHELL, ids=_name)
def test_commands_parse(block: Block) -> None:
    """Subcommands, options and settings of every `megatron-fipo` command exist; placeholders stand for values."""
    for arguments in commands(block.text):
        parse(arguments)


def test_commands_are_found() -> None:
    """In pipes, after `&&`, over several lines, as a module and in batch scripts; not in comments."""
    text = (
        "srun --gpus=1 .venv/bin/megatron-fipo doctor a.yaml && megatron-fipo report x | tail\n"
        "torchrun -m megatron_fipo.cli train \\\n  a.yaml  # megatron-fipo nothing\n"
        "sbatch --nodes=2 slurm/fipo_32b.sh my.yaml run.seed=2\nls\n"
    )
    assert commands(text) == [
        ["doctor", "a.yaml"],
        ["report", "x"],
        ["train", "a.yaml"],
        ["train", "--recipe", "examples/fipo_32b.yaml", "my.yaml", "run.seed=2"],
    ]
    assert len([arguments for block in SHELL for arguments in commands(block.text)]) > 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "a.yaml"], "No such command"),
        (["train", "a.yaml", "--dryrun"], "No such option"),
        (["train", "a.yaml", "trainer.max_step=3"], "trainer.max_step is no setting"),
        (["scaling", "plan", "--rows", "many"], "valid integer"),
        (["convert", "to-hf", "--out", "x"], "Missing parameter: megatron"),
    ],
)
def test_wrong_commands_are_found(arguments: list[str], message: str) -> None:
    """A wrong subcommand, option, setting or value, or one that is missing."""
    with pytest.raises(Exception, match=message):
        parse(arguments)


@pytest.mark.slow  # whole commands, each of which imports torch and Megatron-Core
@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("page", RUN)
def test_blocks_run(page: str, tmp_path: Path) -> None:
    """All blocks that are not marked, in order, in one shell; the first command that fails ends it with an error."""
    for name in ("megatron_fipo", "examples", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = "\n".join(block.text for block in blocks(page) if block.language == "bash" and block.not_run is None)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        ["bash", "-euxo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that ranks end with the shell, also when the test fails
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, output[-5000:]
