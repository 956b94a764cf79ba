"""Model shapes for the planner, by published name or from a checkpoint directory.

Beyond what the package trains, a shape describes models of the literature: MLPs without a gate, shared experts, first
layers without experts, multi-head latent attention, sliding-window attention.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_fipo.shapes.architecture import Architecture, Experts


@dataclass(frozen=True)
class LatentAttention:
    """Low-rank projections of queries, keys and values (DeepSeek-V2, section 2.1).

    `rope_dim` of each head's query and key are rotated by position, `plain_dim` are not.
    """

    query_rank: int
    key_value_rank: int
    plain_dim: int
    rope_dim: int


@dataclass(frozen=True)
class ModelShape(Architecture):
    """An `Architecture` with the features that only models of the literature have.

    Attributes:
        gated_mlp: three matrices (SwiGLU) instead of two.
        shared_ffn_hidden_size: width of the shared expert.
        dense_layers: number of first layers without experts, of width `ffn_hidden_size`.
        latent: None for multi-head or grouped-query attention, where `head_dim` is that of keys; here it is that of
            values.
        window: keys visible to a query in every other layer; None: all preceding.
        predicts_second_token: one more layer and head predict the token after the next (DeepSeek-V3, section 2.2); only
            in the time of an update.
    """

    gated_mlp: bool = True
    shared_ffn_hidden_size: int = 0
    dense_layers: int = 0
    latent: LatentAttention | None = None
    window: int | None = None
    predicts_second_token: bool = False

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def key_size_over(self, tensor: int) -> int:
        """Return the width of all keys on `tensor` tensor-parallel ranks, including copies of shared heads."""
        return max(self.num_kv_heads, tensor) * self.head_dim

    @property
    def mlp_matrices(self) -> int:
        return 3 if self.gated_mlp else 2


def shape_of(arch: Architecture) -> ModelShape:
    """Convert an architecture to a shape."""
    if isinstance(arch, ModelShape):
        return arch
    return ModelShape(**{f.name: getattr(arch, f.name) for f in fields(Architecture)})


def plain_architecture(shape: ModelShape) -> Architecture:
    """Return the architecture that the package can build.

    Raises:
        ValueError: the package does not implement its layers.
    """
    if shape.latent or shape.window or shape.dense_layers or shape.shared_ffn_hidden_size or not shape.gated_mlp:
        raise ValueError(f"a {shape.model_type} model has layers that this package cannot train")
    return Architecture(**{f.name: getattr(shape, f.name) for f in fields(Architecture)})


def make_shape(
    layers: int, hidden: int, ffn: int, heads: int, kv_heads: int | None = None, vocab: int = 51200, **more: Any
) -> ModelShape:
    """Build a shape from the numbers that tables print; `more` sets any other field."""
    numbers: dict[str, Any] = {
        "model_type": "llama",
        "head_dim": hidden // heads,
        "max_position_embeddings": 1 << 20,
        "rope_theta": 1e6,
        "rope_interpolation": None,
        "norm_eps": 1e-6,
        "tied_embeddings": False,
        "qkv_bias": False,
        "qk_norm": False,
    }
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_heads=heads,
        num_kv_heads=kv_heads or heads,
        vocab_size=vocab,
        **(numbers | more),
    )


def _experts(count: int, active: int, ffn: int) -> Experts:
    return Experts(count, active, ffn, normalized=True)


_QWEN25: dict[str, Any] = {"model_type": "qwen2", "qkv_bias": True}
_QWEN3: dict[str, Any] = {"model_type": "qwen3", "qk_norm": True, "head_dim": 128}
_QWEN3_MOE = {**_QWEN3, "model_type": "qwen3_moe"}
_GPT: dict[str, Any] = {"model_type": "gpt", "gated_mlp": False}
_DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "head_dim": 128,
    "latent": LatentAttention(query_rank=1536, key_value_rank=512, plain_dim=128, rope_dim=64),
    "shared_ffn_hidden_size": 2048,
}
# From each model's config.json or, for those without one, from the paper or recipe that describes it.
PUBLISHED: dict[str, ModelShape] = {
    "qwen2.5-0.5b": make_shape(24, 896, 4864, 14, 2, 151936, tied_embeddings=True, **_QWEN25),
    "qwen2.5-1.5b": make_shape(28, 1536, 8960, 12, 2, 151936, tied_embeddings=True, **_QWEN25),
    "qwen2.5-3b": make_shape(36, 2048, 11008, 16, 2, 151936, tied_embeddings=True, **_QWEN25),
    "qwen2.5-7b": make_shape(28, 3584, 18944, 28, 4, 152064, **_QWEN25),
    "qwen2.5-math-7b": make_shape(28, 3584, 18944, 28, 4, 152064, **_QWEN25),
    "qwen2.5-14b": make_shape(48, 5120, 13824, 40, 8, 152064, **_QWEN25),
    "qwen2.5-32b": make_shape(64, 5120, 27648, 40, 8, 152064, **_QWEN25),
    "qwen2.5-72b": make_shape(80, 8192, 29568, 64, 8, 152064, **_QWEN25),
    "qwen3-0.6b": make_shape(28, 1024, 3072, 16, 8, 151936, tied_embeddings=True, **_QWEN3),
    "qwen3-1.7b": make_shape(28, 2048, 6144, 16, 8, 151936, tied_embeddings=True, **_QWEN3),
    "qwen3-4b": make_shape(36, 2560, 9728, 32, 8, 151936, tied_embeddings=True, **_QWEN3),
    "qwen3-8b": make_shape(36, 4096, 12288, 32, 8, 151936, **_QWEN3),
    "qwen3-14b": make_shape(40, 5120, 17408, 40, 8, 151936, **_QWEN3),
    "qwen3-32b": make_shape(64, 5120, 25600, 64, 8, 151936, **_QWEN3),
    "qwen3-30b-a3b": make_shape(48, 2048, 6144, 32, 4, 151936, experts=_experts(128, 8, 768), **_QWEN3_MOE),
    "qwen3-235b-a22b": make_shape(94, 4096, 12288, 64, 4, 151936, experts=_experts(128, 8, 1536), **_QWEN3_MOE),
    "llama2-7b": make_shape(32, 4096, 11008, 32, 32, 32000),
    "llama2-13b": make_shape(40, 5120, 13824, 40, 40, 32000),
    "llama2-70b": make_shape(80, 8192, 28672, 64, 8, 32000),
    "llama3-8b": make_shape(32, 4096, 14336, 32, 8, 128256),
    "llama3-70b": make_shape(80, 8192, 28672, 64, 8, 128256),
    "llama3-405b": make_shape(126, 16384, 53248, 128, 8, 128256),
    "mistral-7b": make_shape(32, 4096, 14336, 32, 8, 32000, model_type="mistral"),
    "mixtral-8x7b": make_shape(32, 4096, 14336, 32, 8, 32000, model_type="mixtral", experts=_experts(8, 2, 14336)),
    "mixtral-8x22b": make_shape(56, 6144, 16384, 48, 8, 32768, model_type="mixtral", experts=_experts(8, 2, 16384)),
    "deepseek-v3": make_shape(
        61, 7168, 18432, 128, None, 129280, experts=_experts(256, 8, 2048), dense_layers=3, **_DEEPSEEK
    ),
    "kimi-k2": make_shape(
        61, 7168, 18432, 64, None, 163840, experts=_experts(384, 8, 2048), dense_layers=1, **_DEEPSEEK
    ),
    "gpt-oss-120b": make_shape(
        36, 2880, 2880, 64, 8, 201088, head_dim=64, window=128, experts=_experts(128, 4, 2880), model_type="gpt_oss"
    ),
    "grok-1": make_shape(64, 6144, 32768, 48, 8, 131072, head_dim=128, experts=_experts(8, 2, 32768)),
    "gpt3-5b": make_shape(24, 4096, 16384, 32, **_GPT),
    "gpt3-20b": make_shape(44, 6144, 24576, 48, **_GPT),
    "gpt3-175b": make_shape(96, 12288, 49152, 96, **_GPT),
    "nemotron-8b": make_shape(32, 4096, 16384, 32, 32, 256000, **_GPT),
    "nemotron-15b": make_shape(32, 6144, 24576, 48, 8, 256000, **_GPT),
    "nemotron-22b": make_shape(40, 6144, 24576, 48, 48, 256000, **_GPT),
    "nemotron-340b": make_shape(96, 18432, 73728, 96, 8, 256000, **_GPT),
}


def find_model(name: str) -> ModelShape:
    """Return a model by published name (case-insensitive, owner optional) or Hugging Face checkpoint directory.

    Raises:
        ValueError: unknown name, or a checkpoint that the package cannot train.
    """
    if (Path(name) / "config.json").is_file():
        from megatron_fipo.model.architecture import architecture, load_hf_config

        return shape_of(architecture(load_hf_config(name, {})))
    key = Path(name).name.lower()
    key = key.replace("meta-", "").replace("llama-3.1", "llama3").replace("llama-3", "llama3")
    for suffix in ("-base", "-instruct", "-v0.1"):
        key = key.removesuffix(suffix)
    if key in PUBLISHED:
        return PUBLISHED[key]
    near = difflib.get_close_matches(key, PUBLISHED, n=3, cutoff=0.4) or sorted(PUBLISHED)
    raise ValueError(
        f"model {name!r} is neither a directory with a config.json nor a known name; known names: {', '.join(near)}"
    )
