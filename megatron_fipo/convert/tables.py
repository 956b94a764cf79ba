"""Correspondence of Hugging Face tensors and Megatron parameters: one table per model type, for both directions.

`{layer}` and `{expert}` are global numbers. Layer norms and experts have two names in Megatron models: that of the
torch layer spec, and that of Transformer Engine, which fuses a norm into the next linear layer and all experts of a
rank into one module. Distributed checkpoints have neither number in a name: all layers are one tensor there, with a
leading axis for the layer and one for the expert.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_fipo.convert.transforms import COLUMNS, FUSED_QKV, GATE_UP, REPLICATED, VOCABULARY, Transform
from megatron_fipo.model.architecture import Architecture

_HF = "model.layers.{layer}."
_MEGATRON = "decoder.layers.{layer}."
_OUTPUT_LAYER = "output_layer.weight"
_LAYER_NUMBER = re.compile(r"(?<=decoder\.layers\.)\d+(?=\.)")
_EXPERT_NUMBER = re.compile(r"(?<=local_experts\.)\d+(?=\.)|(?<=experts\.linear_fc[12]\.weight)\d+$")


@dataclass(frozen=True)
class Rule:
    """A Megatron parameter, its Hugging Face tensors, and the transform between them.

    Attributes:
        checkpoint: the parameter's name in distributed checkpoints.
        model: names in Megatron models.
        huggingface: names and shapes of the tensors, with sizes as in `_sizes`.
    """

    checkpoint: str
    model: tuple[str, ...]
    huggingface: dict[str, str]
    transform: Transform


@dataclass(frozen=True)
class Parameter:
    """A rule applied to one layer and expert.

    Attributes:
        index: position on the leading axes of the tensor in a distributed checkpoint: (), (layer,), (layer, expert).
        axes: lengths of those axes.
        huggingface: names and shapes of its tensors.
    """

    checkpoint: str
    index: tuple[int, ...]
    axes: tuple[int, ...]
    huggingface: dict[str, tuple[int, ...]]
    transform: Transform

    @property
    def is_expert(self) -> bool:
        return len(self.index) == 2

    @property
    def is_vocabulary(self) -> bool:
        return self.transform is VOCABULARY

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter: its tensors concatenated along rows."""
        shapes = list(self.huggingface.values())
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _rule(model: str, huggingface: dict[str, str], transform: Transform) -> Rule:
    return Rule(model.replace(".{layer}", ""), (model,), huggingface, transform)


def _in_layer(model: str, huggingface: dict[str, str], transform: Transform) -> Rule:
    return _rule(_MEGATRON + model, {_HF + name: shape for name, shape in huggingface.items()}, transform)


def _fused_norm(norm: str, fused: str, huggingface: str) -> Rule:
    names = (_MEGATRON + norm, _MEGATRON + fused)
    return Rule(names[1].replace(".{layer}", ""), names, {_HF + huggingface: "hidden"}, REPLICATED)


def _expert(linear: str, huggingface: dict[str, str], transform: Transform) -> Rule:
    experts = _MEGATRON + "mlp.experts."
    names = (f"{experts}local_experts.{{expert}}.{linear}.weight", f"{experts}{linear}.weight{{expert}}")
    tensors = {_HF + name: shape for name, shape in huggingface.items()}
    return Rule(f"decoder.layers.mlp.experts.experts.{linear}.weight", names, tensors, transform)


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    one = f"{block}.experts.{{expert}}."
    gate_up = {f"{one}{name}.weight": "expert_ffn hidden" for name in (gate, up)}
    return (
        _in_layer("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": "hidden"}, REPLICATED),
        _in_layer("mlp.router.weight", {f"{block}.gate.weight": "experts hidden"}, REPLICATED),
        _expert("linear_fc1", gate_up, GATE_UP),
        _expert("linear_fc2", {f"{one}{down}.weight": "hidden expert_ffn"}, COLUMNS),
    )


_QKV_SIZES = {"q": "query", "k": "key_value", "v": "key_value"}

_DECODER: tuple[Rule, ...] = (
    _rule("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "vocabulary hidden"}, VOCABULARY),
    _rule(_OUTPUT_LAYER, {"lm_head.weight": "vocabulary hidden"}, VOCABULARY),
    _rule("decoder.final_layernorm.weight", {"model.norm.weight": "hidden"}, REPLICATED),
    _fused_norm(
        "input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight", huggingface="input_layernorm.weight"
    ),
    _in_layer(
        "self_attention.linear_qkv.weight",
        {f"self_attn.{x}_proj.weight": f"{size} hidden" for x, size in _QKV_SIZES.items()},
        FUSED_QKV,
    ),
    _in_layer("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "hidden query"}, COLUMNS),
)
_QKV_BIAS = _in_layer(
    "self_attention.linear_qkv.bias",
    {f"self_attn.{x}_proj.bias": size for x, size in _QKV_SIZES.items()},
    FUSED_QKV,
)
_QK_NORM = tuple(
    _in_layer(f"self_attention.{x}_layernorm.weight", {f"self_attn.{x}_norm.weight": "head"}, REPLICATED) for x in "qk"
)
_MLP: tuple[Rule, ...] = (
    _fused_norm(
        "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", huggingface="post_attention_layernorm.weight"
    ),
    _in_layer("mlp.linear_fc1.weight", {f"mlp.{x}_proj.weight": "ffn hidden" for x in ("gate", "up")}, GATE_UP),
    _in_layer("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "hidden ffn"}, COLUMNS),
)

TABLES: dict[str, tuple[Rule, ...]] = {
    "qwen2": (*_DECODER, _QKV_BIAS, *_MLP),
    "qwen3": (*_DECODER, *_QK_NORM, *_MLP),
    "llama": (*_DECODER, *_MLP),
    "mistral": (*_DECODER, *_MLP),
    "qwen3_moe": (*_DECODER, *_QK_NORM, *_experts("mlp", "gate_proj", "up_proj", "down_proj")),
    "mixtral": (*_DECODER, *_experts("block_sparse_moe", "w1", "w3", "w2")),
}


def _sizes(arch: Architecture) -> dict[str, int]:
    sizes = {
        "vocabulary": arch.vocab_size,
        "hidden": arch.hidden_size,
        "head": arch.head_dim,
        "query": arch.num_heads * arch.head_dim,
        "key_value": arch.num_kv_heads * arch.head_dim,
        "ffn": arch.ffn_hidden_size,
    }
    if arch.experts is not None:
        sizes |= {"experts": arch.experts.count, "expert_ffn": arch.experts.ffn_hidden_size}
    return sizes


def _apply(rule: Rule, index: tuple[int, ...], axes: tuple[int, ...], sizes: Mapping[str, int]) -> Parameter:
    numbers = dict(zip(("layer", "expert"), index, strict=False))
    tensors = {
        name.format(**numbers): tuple(sizes[size] for size in shape.split()) for name, shape in rule.huggingface.items()
    }
    return Parameter(rule.checkpoint, index, axes, tensors, rule.transform)


def _axes(rule: Rule, arch: Architecture) -> tuple[int, ...]:
    numbered = rule.model[0]
    layers = (arch.num_layers,) if "{layer}" in numbered else ()
    experts = (arch.experts.count,) if "{expert}" in numbered and arch.experts else ()
    return layers + experts


def parameters(arch: Architecture) -> Iterator[Parameter]:
    """Yield every parameter of the whole model, layer by layer; tied embeddings have no output layer."""
    sizes = _sizes(arch)
    rules = [r for r in TABLES[arch.model_type] if not (arch.tied_embeddings and r.checkpoint == _OUTPUT_LAYER)]
    entries = [
        (index, number)
        for number, rule in enumerate(rules)
        for index in itertools.product(*map(range, _axes(rule, arch)))
    ]
    for index, number in sorted(entries, key=lambda entry: (entry[0][:1], entry[1], entry[0])):
        yield _apply(rules[number], index, _axes(rules[number], arch), sizes)


def find(name: str, arch: Architecture) -> Parameter:
    """Return the parameter with this name in a Megatron model, with global layer and expert numbers.

    With tied embeddings, the output layer on a pipeline's last stage maps to the embedding.

    Raises:
        ValueError: the parameter has no rule in the model's table.
    """
    if arch.tied_embeddings and name == _OUTPUT_LAYER:
        name = "embedding.word_embeddings.weight"
    layer, expert = _LAYER_NUMBER.search(name), _EXPERT_NUMBER.search(name)
    index = tuple(int(found[0]) for found in (layer, expert) if found)
    pattern = _EXPERT_NUMBER.sub("{expert}", _LAYER_NUMBER.sub("{layer}", name))
    for rule in TABLES[arch.model_type]:
        if pattern in rule.model:
            return _apply(rule, index, _axes(rule, arch), _sizes(arch))
    raise ValueError(f"Megatron parameter {name!r} has no counterpart in the {arch.model_type} table")


def renumber(name: str, first_layer: int, first_expert: int) -> str:
    """Convert a parameter's name on one rank to global numbering."""
    name = _LAYER_NUMBER.sub(lambda found: str(int(found[0]) + first_layer), name)
    return _EXPERT_NUMBER.sub(lambda found: str(int(found[0]) + first_expert), name)


def huggingface_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that a checkpoint of this architecture must have."""
    return {name: shape for parameter in parameters(arch) for name, shape in parameter.huggingface.items()}


def check_tensors(found: Mapping[str, tuple[int, ...]], arch: Architecture, where: str) -> None:
    """Compare a checkpoint's tensor names and shapes with the architecture's.

    Raises:
        ValueError: tensors are missing, unexpected, or of another shape.
    """
    expected = huggingface_shapes(arch)
    # Some checkpoints with tied embeddings also store the output layer, and old Llama ones a rope buffer.
    ignorable = {"lm_head.weight"} if arch.tied_embeddings else set()
    unexpected = {n for n in found.keys() - expected.keys() - ignorable if not n.endswith(".rotary_emb.inv_freq")}
    for kind, names in (("lacks", sorted(expected.keys() - found.keys())), ("has unexpected", sorted(unexpected))):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise ValueError(f"{where} {kind} tensors: {', '.join(names[:5])}{more}")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise ValueError(f"{name} of {where} has shape {tuple(found[name])}, but its config.json requires {shape}")
