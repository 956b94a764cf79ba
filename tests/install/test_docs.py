"""Commands of docs/gpu.md name what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_fipo import install_transformer_engine

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "gpu.md").read_text()
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b(?:examples|slurm)/[\w./]+\w", TEXT))))
def test_files_exist(path: str) -> None:
    """Every file of the repository that the page names."""
    assert (ROOT / path).exists()


def test_make_targets_exist() -> None:
    """Every target that the page runs."""
    targets = set(re.findall(r"^make ([\w-]+)", BLOCKS, re.MULTILINE))
    assert targets == {"install", "vllm-env"}
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_container_commands_are_the_scripts_own() -> None:
    """The page and the head of the build script agree to the letter."""
    head = (ROOT / "slurm" / "container" / "build.sh").read_text()
    commands = re.findall(r"^enroot .*", BLOCKS, re.MULTILINE)
    assert len(commands) == 4
    assert [c for c in commands if f"#   {c}\n" not in head] == []


def test_version_of_transformer_engine() -> None:
    """The page names the version that is installed."""
    assert f"Transformer Engine {install_transformer_engine.VERSION}." in TEXT
