"""Mapping of models, GPUs and precisions in published tables to the planner's names and shapes."""

from __future__ import annotations

import re
from dataclasses import replace

from megatron_fipo.scaling.cost.flops import parameters
from megatron_fipo.scaling.cost.model_shapes import PUBLISHED, ModelShape, make_shape

Fields = dict[str, str]


class Unusable(Exception):
    """Reason why a row cannot be used."""


NAMES = (  # pattern in the lower-case model name -> published shape
    (r"llama.?3.*405b", "llama3-405b"),
    (r"llama.?3.*70b", "llama3-70b"),
    (r"llama.?3.*8b", "llama3-8b"),
    (r"llama2-70b", "llama2-70b"),
    (r"llama2-7b", "llama2-7b"),
    (r"llama-like-3b", "llama-like-3b"),
    (r"deepseek ?v3(?!.*proxy)", "deepseek-v3"),
    (r"kimi_k2", "kimi-k2"),
    (r"qwen3_?-?30b", "qwen3-30b-a3b"),
    (r"qwen3_?-?235b", "qwen3-235b-a22b"),
    (r"qwen3_?-?32b", "qwen3-32b"),
    (r"gpt oss 120b", "gpt-oss-120b"),
    (r"grok", "grok-1"),
    (r"mixtral_8x7b", "mixtral-8x7b"),
    (r"mixtral_8x22b", "mixtral-8x22b"),
    (r"gpt3-5b", "gpt3-5b"),
    (r"gpt3-20b", "gpt3-20b"),
    (r"gpt3-175b|nemo megatron", "gpt3-175b"),
    (r"nemotron-8b", "nemotron-8b"),
    (r"nemotron4? 15b", "nemotron-15b"),
    (r"nemotron-22b", "nemotron-22b"),
    (r"nemotron4?[- ]340b", "nemotron-340b"),
)
SHAPES = {**PUBLISHED, "llama-like-3b": make_shape(28, 3072, 8192, 32, 32, 49152)}
OTHER_MODELS = r"nemotron.?3.?(super|nano)|deepseekv4|maverick|paxml|proxy|size not in"
GPUS = (  # pattern in the name -> key of hardware.yaml
    (r"^a[18]00.*40", "A100-40"),
    (r"^a[18]00", "A100-80"),
    (r"^h800", "H800-80"),
    (r"^h100", "H100-80"),
    (r"^(h200|h20|b200|b300|gb200|gb300)\b", None),
)


def model_of(f: Fields) -> ModelShape:
    """Return the published shape with this name, with the row's own numbers where printed."""
    number = {k: int(float(f[k])) for k in ("layers", "hidden", "ffn", "heads", "kv_heads", "vocab") if f[k]}
    name = name_of(f)
    if name is not None and number.get("hidden", SHAPES[name].hidden_size) == SHAPES[name].hidden_size:
        known = SHAPES[name]
        # A table that mixes proxies of few layers with the full model prints the layers of each.
        layers = number.get("layers", known.num_layers)
        return replace(
            known,
            num_layers=layers,
            vocab_size=number.get("vocab", known.vocab_size),
            # FLOPs per token of NVIDIA's tables include the second prediction unless they say that it is off
            predicts_second_token=name == "deepseek-v3" and "w/o MTP" not in f["notes"],
        )
    if not {"layers", "hidden", "heads"} <= number.keys():
        raise Unusable("model without a shape")
    if f.get("ep") not in (None, "", "1"):
        raise Unusable("experts without a shape")
    h = number["hidden"]
    sizes = (number["layers"], h, number.get("ffn", 4 * h), number["heads"], number.get("kv_heads"))
    gelu = make_shape(*sizes, number.get("vocab", 51200), model_type="gpt", gated_mlp=False)
    swiglu = make_shape(*sizes, number.get("vocab", 51200))
    if re.search(r"llama|qwen|mistral", f["model"].lower()):
        return swiglu
    if "gpt" in f["model"].lower() or not f["params_b"]:
        return gelu
    printed = float(f["params_b"]) * 1e9
    return min((gelu, swiglu), key=lambda shape: abs(parameters(shape) - printed))


def name_of(f: Fields) -> str | None:
    """Return the name of a published shape, from the table above or because the model has this name."""
    listed = next((shape for pattern, shape in NAMES if re.search(pattern, f["model"].lower())), None)
    plain = re.sub(r"[^a-z0-9]", "", f["model"].lower())
    called = [shape for shape in PUBLISHED if re.sub(r"[^a-z0-9]", "", shape) in plain]
    return listed or max(called, key=len, default=None)


def gpu_of(name: str) -> str:
    """Return the key of hardware.yaml."""
    for pattern, known in GPUS:
        if found := re.search(pattern, name.lower()):
            return known or found[1].upper()
    raise Unusable(f"unknown GPU {name}")


def precision_of(name: str) -> str:
    """Return the matmul dtype of the layers; float16 is as fast as bfloat16."""
    if "fp8" in name:
        return "float8"
    if "fp4" in name:
        return "float4"
    if name in ("", "bf16", "fp16", "mixed fp16", "bfloat16", "float16"):
        return "bfloat16"
    raise Unusable(f"precision {name}")
