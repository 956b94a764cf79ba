"""Configs that Megatron-Core would compute differently are refused, each with the field that says so."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from megatron_fipo.model.architecture import Experts, architecture
from tests.support.families import FAMILIES

_LLAMA3 = FAMILIES["llama3"]["rope_parameters"]


def _config(family: str, **changes: Any) -> Any:
    return AutoConfig.for_model(**{**FAMILIES[family], "hidden_size": 64, "num_attention_heads": 4, **changes})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama3", {"attention_bias": True}, "attention_bias of a llama model"),
        ("llama2", {"mlp_bias": True}, "mlp_bias of a llama model"),
        ("qwen3", {"attention_bias": True}, "attention_bias of a qwen3 model"),
        ("llama3", {"rope_parameters": {**_LLAMA3, "low_freq_factor": 2.0}}, r"low_freq_factor 2\.0 is not supported"),
        ("llama3", {"rope_parameters": {**_LLAMA3, "high_freq_factor": 8.0}}, r"must be 4\.0"),
        (
            "llama3",
            {"rope_parameters": {**_LLAMA3, "original_max_position_embeddings": 4096}},
            "original_max_position_embeddings 4096 is not supported: must be 8192",
        ),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, "rope type 'yarn'"),
        ("mistral", {"sliding_window": 32, "max_position_embeddings": 64}, "sliding_window 32 is below"),
        ("mixtral", {"sliding_window": 32, "max_position_embeddings": 64}, "sliding_window 32 is below"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "every layer must have experts"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\] make some layers dense"),
    ],
)
def test_refused(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        architecture(_config(family, **changes))


def test_window_as_wide_as_the_context_is_none() -> None:
    """A window that no token is outside of changes nothing."""
    assert architecture(_config("mistral", sliding_window=64, max_position_embeddings=64)).model_type == "mistral"


def test_numbers_of_the_families() -> None:
    """The message names each difference: biases, norms, rope factor, heads, experts."""
    assert architecture(_config("qwen2")).qkv_bias
    assert architecture(_config("qwen3")).qk_norm
    assert architecture(_config("qwen3")).head_dim == 24
    assert architecture(_config("llama3_tied")).rope_llama3_factor == 32.0
    assert architecture(_config("qwen3_moe")).experts == Experts(6, 2, 24, normalized=True)
    assert not architecture(_config("qwen3_moe_share_of_all")).experts.normalized
    assert architecture(_config("mixtral", intermediate_size=88)).experts == Experts(4, 2, 88, normalized=True)
