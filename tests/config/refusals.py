"""Problems that the validation of a config lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fipo.config import load_config

REQUIRED = {"model": {"hf_path": "model"}, "data": {"train": "train.parquet"}}


def refused(file: Path, *overrides: str) -> list[str]:
    """Load a config that is illegal; return its problems."""
    with pytest.raises(ValueError, match="illegal configuration") as error:
        load_config(file, overrides)
    first, *problems = str(error.value).splitlines()
    assert first == "illegal configuration:"
    return [problem.removeprefix("  - ") for problem in problems]
