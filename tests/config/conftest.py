"""A config file for the tests of loading and validation."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.config.refusals import REQUIRED


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A config that sets only what must be set."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(REQUIRED))
    return path
