"""Rotary embeddings in config.json: as transformers 5 writes them, as older ones did, and incomplete ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.model.architecture import architecture, load_hf_config
from tests.policies import make_qwen2


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("qwen2"), layers=1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"rope_type": "linear", "factor": 2.0}, "lacks rope_theta"),
        ({"rope_type": "linear", "rope_theta": 10000.0}, "lacks factor"),
        (None, "lacks rope_theta"),
    ],
)
def test_incomplete_rope_is_named(path: Path, override: dict[str, Any] | None, message: str) -> None:
    """An override of rope_parameters that leaves something out is refused with what is missing."""
    with pytest.raises(ValueError, match=message):
        architecture(load_hf_config(str(path), {"rope_parameters": override}))


def test_config_of_older_transformers(path: Path, tmp_path: Path) -> None:
    """Published checkpoints have rope_theta and rope_scaling at the top level of config.json."""
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"]
    old = config | {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 4.0}}
    (tmp_path / "config.json").write_text(json.dumps(old))
    arch = architecture(load_hf_config(str(tmp_path), {}))
    assert (arch.rope_theta, arch.rope_interpolation) == (1e6, 4.0)
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 1e6}))
    arch = architecture(load_hf_config(str(tmp_path), {}))
    assert (arch.rope_theta, arch.rope_interpolation) == (1e6, None)
