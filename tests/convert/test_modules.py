"""Weights by their published names into a live transformers model: what the embedded rollout engine does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_fipo.rollout import HFEngine
from tests.support.families import make_checkpoint


@pytest.mark.parametrize("family", ["qwen2_tied", "qwen3_moe", "mixtral"])
def test_engine_holds_what_transformers_loads(family: str, tmp_path: Path) -> None:
    """Experts included, which transformers keeps in one tensor for all of a layer's."""
    path = make_checkpoint(tmp_path, family, num_hidden_layers=2)
    engine = HFEngine(AutoConfig.from_pretrained(path), torch.float32, torch.device("cpu"), batch_size=2)
    engine.load_weights(iter(load_file(path / "model.safetensors").items()))
    expected = AutoModelForCausalLM.from_pretrained(path).state_dict()
    for name, tensor in engine.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
