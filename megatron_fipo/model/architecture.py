"""Architecture for Megatron-Core from a Hugging Face config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from megatron_fipo.atomic_file import read_json
from megatron_fipo.model.rope import check_spellings, checked_rope, overridden_rope
from megatron_fipo.shapes.architecture import Architecture, Experts

SUPPORTED_MODEL_TYPES = ("qwen2", "qwen3", "llama", "mistral", "qwen3_moe", "mixtral")
_ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta")


def load_hf_config(path: str, overrides: dict[str, Any]) -> PretrainedConfig:
    """Read config.json of a Hugging Face checkpoint and replace the fields named in `overrides`.

    Raises:
        ValueError: the checkpoint does not exist, its config is invalid or of an unsupported model type, or an
            override is unknown.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(
            f"model.hf_path {path!r} has no config.json: it must be a checkpoint directory; "
            f"`hf download ORGANIZATION/NAME --local-dir {path}` downloads a published one"
        )
    config = read_json(file)
    if config.get("model_type") in SUPPORTED_MODEL_TYPES:
        check_spellings(config, str(file))
    elif "auto_map" in config:
        raise ValueError(
            f"{file}: model type {config.get('model_type')!r} has custom code (auto_map), which is never run; "
            f"supported model types: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    try:
        hf = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    if hf.model_type not in SUPPORTED_MODEL_TYPES:
        supported = ", ".join(SUPPORTED_MODEL_TYPES)
        raise ValueError(f"model type {hf.model_type!r} of {path} is not supported: must be one of {supported}")
    _override(hf, overrides)
    return hf


def _override(hf: PretrainedConfig, overrides: dict[str, Any]) -> None:
    """Replace fields; rotary embedding fields may use either spelling."""
    for key, value in overrides.items():
        if key in _ROPE_FIELDS:
            continue
        if not hasattr(hf, key):
            raise ValueError(f"model.overrides.{key}: the {hf.model_type} config does not have this field")
        try:
            setattr(hf, key, value)
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise ValueError(f"model.overrides.{key}: {error}") from None
    if not overrides.keys().isdisjoint(_ROPE_FIELDS):
        hf.rope_parameters = overridden_rope(hf.rope_parameters or {}, overrides)


def architecture(hf: PretrainedConfig) -> Architecture:
    """Convert a supported config; reject what the Megatron model would compute differently.

    Raises:
        ValueError: sliding-window attention, an activation other than SiLU, biases, an unsupported or incomplete rope
            type, or experts in only some layers.
    """
    _refuse_other_models(hf)
    rope = checked_rope(hf.rope_parameters)
    factor = {rope["rope_type"]: float(rope.get("factor", 1.0))}
    return Architecture(
        model_type=hf.model_type,
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        vocab_size=hf.vocab_size,
        max_position_embeddings=hf.max_position_embeddings,
        rope_theta=float(rope["rope_theta"]),
        rope_interpolation=factor.get("linear"),
        norm_eps=hf.rms_norm_eps,
        tied_embeddings=hf.tie_word_embeddings,
        qkv_bias=hf.model_type == "qwen2",
        qk_norm=hf.model_type in ("qwen3", "qwen3_moe"),
        rope_llama3_factor=factor.get("llama3"),
        experts=_experts(hf),
    )


def _refuse_other_models(hf: PretrainedConfig) -> None:
    if hf.hidden_act != "silu":
        raise ValueError(f"hidden_act {hf.hidden_act!r} is not supported: must be silu (SwiGLU)")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(hf, name, False):
            raise ValueError(f"{name} of a {hf.model_type} model is not supported")
    if getattr(hf, "use_sliding_window", False):
        raise ValueError("use_sliding_window: sliding-window attention is not supported; set it to false to ignore it")
    # Qwen's configs control the window by the flag above; Mistral's by a width.
    window = None if hasattr(hf, "use_sliding_window") else getattr(hf, "sliding_window", None)
    if window is not None and window < hf.max_position_embeddings:
        raise ValueError(
            f"sliding_window {window} is below max_position_embeddings {hf.max_position_embeddings}: "
            f"sliding-window attention is not supported; set max_position_embeddings to at most {window}"
        )


def _experts(hf: PretrainedConfig) -> Experts | None:
    if hf.model_type == "mixtral":
        experts = Experts(hf.num_local_experts, hf.num_experts_per_tok, hf.intermediate_size, normalized=True)
    elif hf.model_type == "qwen3_moe":
        if hf.decoder_sparse_step != 1 or hf.mlp_only_layers:
            raise ValueError(
                f"decoder_sparse_step {hf.decoder_sparse_step} and mlp_only_layers {hf.mlp_only_layers} make some "
                "layers dense, which is not supported: every layer must have experts"
            )
        experts = Experts(hf.num_experts, hf.num_experts_per_tok, hf.moe_intermediate_size, hf.norm_topk_prob)
    else:
        return None
    if not 1 <= experts.active <= experts.count:
        raise ValueError(f"num_experts_per_tok {experts.active} must be between 1 and the {experts.count} experts")
    if experts.active == 1 and experts.normalized:
        raise ValueError(
            "num_experts_per_tok 1 with normalized weights is not supported: the one weight is always 1, which leaves "
            "the router without a gradient, and Megatron-Core does not build it"
        )
    return experts
