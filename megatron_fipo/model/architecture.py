"""Hugging Face config -> what Megatron-Core needs to know, with every check that can be made before ranks start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from megatron_fipo.config import Config, ParallelConfig

SUPPORTED_MODEL_TYPES = ("qwen2",)
_VOCABULARY_MULTIPLE = 64  # rows of each tensor-parallel vocabulary shard; keeps GEMM shapes aligned


@dataclass(frozen=True)
class Architecture:
    """The numbers of a decoder-only model, in the names of this project.

    Attributes:
        vocab_size: the model's own vocabulary (rows of the Hugging Face embedding).
        rope_interpolation: linear scaling factor of positions, None for plain rope.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rope_interpolation: float | None
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Vocabulary rows after padding to equal tensor-parallel shards."""
        multiple = _VOCABULARY_MULTIPLE * tensor_parallel
        return -(-self.vocab_size // multiple) * multiple


def load_hf_config(path: str, overrides: dict[str, Any]) -> PretrainedConfig:
    """Read config.json of a Hugging Face checkpoint and replace the fields named in `overrides`.

    Raises:
        ValueError: no such checkpoint, an unsupported model type, or an override that the config does not know.
    """
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"model.hf_path {path!r} has no config.json: it must be the directory of a checkpoint")
    hf = AutoConfig.from_pretrained(path, local_files_only=True)
    if hf.model_type not in SUPPORTED_MODEL_TYPES:
        supported = ", ".join(SUPPORTED_MODEL_TYPES)
        raise ValueError(f"model type {hf.model_type!r} of {path} is not supported; supported: {supported}")
    for key, value in overrides.items():
        if not hasattr(hf, key):
            raise ValueError(f"model.overrides.{key}: the {hf.model_type} config has no such field")
        setattr(hf, key, value)
    return hf


def architecture(hf: PretrainedConfig) -> Architecture:
    """Translate a supported config, refusing what the Megatron model would compute differently.

    Raises:
        ValueError: sliding-window attention, another activation than SiLU, or an unsupported kind of rope.
    """
    if hf.hidden_act != "silu":
        raise ValueError(f"hidden_act {hf.hidden_act!r} is not supported: SwiGLU (silu) models only")
    if getattr(hf, "use_sliding_window", False):
        raise ValueError("use_sliding_window: sliding-window attention is not supported; set it to false to ignore it")
    rope = hf.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear"):
        raise ValueError(f"rope type {kind!r} is not supported; supported: default, linear")
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
        rope_interpolation=float(rope["factor"]) if kind == "linear" else None,
        norm_eps=hf.rms_norm_eps,
        tied_embeddings=hf.tie_word_embeddings,
        qkv_bias=True,
    )


def stage_layers(num_layers: int, p: ParallelConfig) -> list[int]:
    """Layers of each pipeline stage, first to last.

    Raises:
        ValueError: the layers cannot be dealt out; the message shows the arithmetic.
    """
    fixed = [n for n in (p.first_stage_layers, p.last_stage_layers) if n is not None]
    left, stages = num_layers - sum(fixed), p.pipeline - len(fixed)
    per_stage, rest = divmod(left, stages) if stages else (0, left)
    uneven = f" - {' - '.join(map(str, fixed))} (first/last stage)" if fixed else ""
    arithmetic = f"{num_layers} layers{uneven} = {left} over {stages} pipeline stages"
    if rest or left < 0 or (stages and per_stage < 1) or min(fixed, default=1) < 1:
        raise ValueError(
            f"{arithmetic} leaves {rest}: set parallel.first_stage_layers / last_stage_layers so that "
            f"the other stages are equal and hold at least one layer, or change parallel.pipeline"
        )
    first = [p.first_stage_layers] if p.first_stage_layers is not None else []
    last = [p.last_stage_layers] if p.last_stage_layers is not None else []
    layers = [*first, *[per_stage] * stages, *last]
    if any(n % p.virtual_pipeline for n in layers):
        raise ValueError(
            f"stages of {layers} layers cannot be cut into parallel.virtual_pipeline {p.virtual_pipeline} equal chunks"
        )
    return layers


def check_model(config: Config) -> Architecture:
    """Everything that can be wrong between a run's config and its model, before any rank starts.

    Raises:
        ValueError: one message that lists all of it.
    """
    arch = architecture(load_hf_config(config.model.hf_path, config.model.overrides))
    p, problems = config.parallel, []
    for name, heads in (("attention heads", arch.num_heads), ("key/value heads", arch.num_kv_heads)):
        if heads % p.tensor:
            legal = [t for t in range(1, heads + 1) if heads % t == 0]
            problems.append(f"{heads} {name} cannot be split over parallel.tensor {p.tensor}; possible: {legal}")
    if arch.ffn_hidden_size % p.tensor:
        problems.append(f"MLP width {arch.ffn_hidden_size} cannot be split over parallel.tensor {p.tensor}")
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > arch.max_position_embeddings:
        problems.append(
            f"data.max_prompt_tokens {config.data.max_prompt_tokens} + rollout.max_response_tokens "
            f"{config.rollout.max_response_tokens} = {longest} exceeds the model's max_position_embeddings "
            f"{arch.max_position_embeddings}; shorten them or set model.overrides.max_position_embeddings"
        )
    try:
        stage_layers(arch.num_layers, p)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("the model does not fit the configuration:\n" + "\n".join(f"  - {x}" for x in problems))
    return arch
