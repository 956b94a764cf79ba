"""docs/security.md names what is there, and says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_fipo.config import Config
from megatron_fipo.config.environment import ALLOWED
from megatron_fipo.config.setting import settings
from megatron_fipo.convert.untrusted import _METADATA_CLASSES

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text()


def test_readme_leads_to_the_page() -> None:
    """By a link."""
    assert "(docs/security.md)" in (ROOT / "README.md").read_text()


def test_settings_exist() -> None:
    """Every setting that the page names is one."""
    named = set(re.findall(r"`([a-z]+(?:\.[a-z_]+)+)(?:=[^`]*)?`", TEXT))
    assert len(named) >= 8
    assert named <= {s.name for s in settings(Config)}


def test_environment_variables_are_those_that_are_allowed() -> None:
    """In their order."""
    section = TEXT.split("## Environment variables in configs")[1].split("\n## ")[0]
    assert tuple(re.findall(r"`([A-Z_]+)`", section)) == ALLOWED


def test_number_of_classes_of_metadata() -> None:
    """Functions and types of tensors' numbers are not counted."""
    functions = {"_get_layout"}
    classes = [name for names in _METADATA_CLASSES.values() for name in names if name not in functions]
    assert f"knows {len(classes)} classes" in TEXT
