"""Tiny random checkpoints of every supported family, with the sizes that conversions get wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}

# Odd vocabularies, heads that do not add up to the hidden size, one key/value head, tied and untied, 4 layers.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "vocab_size": 251},
    "qwen2_tied": {"model_type": "qwen2", "vocab_size": 131, "tie_word_embeddings": True},
    "qwen2_one_kv_head": {"model_type": "qwen2", "vocab_size": 67, "num_key_value_heads": 1},
    "qwen3": {"model_type": "qwen3", "vocab_size": 259, "head_dim": 24},
    "qwen3_tied": {"model_type": "qwen3", "vocab_size": 97, "head_dim": 8, "tie_word_embeddings": True},
    "llama2": {"model_type": "llama", "vocab_size": 203, "num_key_value_heads": 4},
    "llama3": {"model_type": "llama", "vocab_size": 211, "rope_parameters": _LLAMA3_ROPE},
    "llama3_tied": {
        "model_type": "llama",
        "vocab_size": 129,
        "rope_parameters": {**_LLAMA3_ROPE, "factor": 32.0},
        "tie_word_embeddings": True,
        "head_dim": 32,
    },
    "mistral": {"model_type": "mistral", "vocab_size": 127, "sliding_window": None, "head_dim": 12},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "vocab_size": 149,
        "head_dim": 24,
        "num_experts": 6,
        "norm_topk_prob": True,
    }
    | _EXPERTS,
    "qwen3_moe_share_of_all": {"model_type": "qwen3_moe", "vocab_size": 61, "num_experts": 4, "norm_topk_prob": False}
    | _EXPERTS,
    "mixtral": {"model_type": "mixtral", "vocab_size": 101, "num_local_experts": 4, "num_experts_per_tok": 2},
}
MOE = [name for name, family in FAMILIES.items() if family["model_type"] in ("qwen3_moe", "mixtral")]


def make_checkpoint(directory: Path, family: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random checkpoint, with weights large enough that logits differ between tokens."""
    torch.manual_seed(sum(map(ord, family)))
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 88,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**sizes, **FAMILIES[family], **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "experts" in name or name.endswith("gate.weight"):
                parameter.normal_(std=0.15)
    model.to(dtype).save_pretrained(directory)
    return directory
