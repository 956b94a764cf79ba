"""Which Hugging Face tensors make up each Megatron parameter: one table a model type, used in both directions.

`{layer}` stands for the number of the decoder layer, counted over the whole model. Layer norms have two Megatron
names: the torch layer spec's, and Transformer Engine's, which fuses them into the linear layer behind.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fipo.convert.transforms import COLUMNS, FUSED_QKV, GATE_UP, REPLICATED, VOCABULARY, Transform
from megatron_fipo.model.architecture import Architecture

_LAYER = "model.layers.{layer}."


@dataclass(frozen=True)
class Rule:
    """A Megatron parameter, the Hugging Face tensors it is made of, and how."""

    megatron: tuple[str, ...]
    huggingface: tuple[str, ...]
    transform: Transform


_DECODER: tuple[Rule, ...] = (
    Rule(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), VOCABULARY),
    Rule(("output_layer.weight",), ("lm_head.weight",), VOCABULARY),
    Rule(("decoder.final_layernorm.weight",), ("model.norm.weight",), REPLICATED),
    Rule(
        (
            "decoder.layers.{layer}.input_layernorm.weight",
            "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
        ),
        (_LAYER + "input_layernorm.weight",),
        REPLICATED,
    ),
    Rule(
        (
            "decoder.layers.{layer}.pre_mlp_layernorm.weight",
            "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
        ),
        (_LAYER + "post_attention_layernorm.weight",),
        REPLICATED,
    ),
    Rule(
        ("decoder.layers.{layer}.self_attention.linear_qkv.weight",),
        tuple(_LAYER + f"self_attn.{x}_proj.weight" for x in "qkv"),
        FUSED_QKV,
    ),
    Rule(
        ("decoder.layers.{layer}.self_attention.linear_proj.weight",),
        (_LAYER + "self_attn.o_proj.weight",),
        COLUMNS,
    ),
    Rule(
        ("decoder.layers.{layer}.mlp.linear_fc1.weight",),
        (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
        GATE_UP,
    ),
    Rule(("decoder.layers.{layer}.mlp.linear_fc2.weight",), (_LAYER + "mlp.down_proj.weight",), COLUMNS),
)

_QKV_BIAS = Rule(
    ("decoder.layers.{layer}.self_attention.linear_qkv.bias",),
    tuple(_LAYER + f"self_attn.{x}_proj.bias" for x in "qkv"),
    FUSED_QKV,
)

TABLES: dict[str, tuple[Rule, ...]] = {"qwen2": (*_DECODER, _QKV_BIAS)}


@dataclass(frozen=True)
class Mapping:
    """A rule applied to one parameter: its Hugging Face names filled in."""

    huggingface: tuple[str, ...]
    transform: Transform


def find(parameter: str, arch: Architecture) -> Mapping:
    """The mapping of a Megatron parameter, named with its layer number over the whole model.

    With tied embeddings the output layer, where a pipeline's last stage holds a copy, is the embedding.

    Raises:
        ValueError: the parameter is in no rule of the model's table.
    """
    if arch.tied_embeddings and parameter == "output_layer.weight":
        parameter = "embedding.word_embeddings.weight"
    number = re.match(r"decoder\.layers\.(\d+)\.", parameter)
    pattern = parameter.replace(number[0], "decoder.layers.{layer}.") if number else parameter
    for rule in TABLES[arch.model_type]:
        if pattern in rule.megatron:
            layer = number[1] if number else ""
            return Mapping(tuple(name.format(layer=layer) for name in rule.huggingface), rule.transform)
    raise ValueError(f"Megatron parameter {parameter!r} has no counterpart in the {arch.model_type} table")


def huggingface_names(arch: Architecture) -> set[str]:
    """Every tensor that a checkpoint of this architecture must have."""
    names: set[str] = set()
    for rule in TABLES[arch.model_type]:
        if arch.tied_embeddings and rule.megatron == ("output_layer.weight",):
            continue
        for layer in range(arch.num_layers if "{layer}" in rule.megatron[0] else 1):
            names.update(name.format(layer=layer) for name in rule.huggingface)
    return names


def check_names(found: Sequence[str], arch: Architecture, where: str) -> None:
    """Compare a checkpoint's tensor names with the architecture's.

    Raises:
        ValueError: tensors are missing, or there are some that the model would ignore.
    """
    ignorable = {"lm_head.weight"} if arch.tied_embeddings else set()
    expected = huggingface_names(arch)
    missing, unexpected = sorted(expected - set(found)), sorted(set(found) - expected - ignorable)
    for kind, names in (("lacks", missing), ("has unexpected", unexpected)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{where} {kind} tensors: {', '.join(names[:5])}{more}")
