"""Rotary embeddings in config.json: as transformers 5 writes them, as older ones did, and incomplete ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.model.architecture import architecture, load_hf_config
from megatron_fipo.model.rope import in_both_spellings
from megatron_fipo.model.stop_tokens import load_tokenizer
from tests.support.policies import make_qwen2


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


BASE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "vocab_size": 100,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _directory(tmp_path: Path, **config: Any) -> str:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **config}))
    return str(tmp_path)


def _without(rope: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in rope.items() if key != name}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rope_scaling": _without(LLAMA3, "low_freq_factor")}, "rope_scaling .* lacks low_freq_factor"),
        ({"rope_scaling": _without(LLAMA3, "high_freq_factor")}, "rope_scaling .* lacks high_freq_factor"),
        ({"rope_scaling": _without(LLAMA3, "factor")}, "rope_scaling .* lacks factor"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "lacks factor and high_freq_factor and low"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling .* lacks factor"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling .* lacks rope_type"),
        ({"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "has both type and rope_type"),
        ({"rope_scaling": "linear"}, "rope_scaling of .* is 'linear'; expected an object"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "low_freq_factor in rope_scaling .* is None; expected"),
        ({"rope_scaling": {**LLAMA3, "factor": "8"}}, "factor in rope_scaling .* is '8'; expected a positive number"),
        ({"rope_theta": "1e6"}, "rope_theta of .* is '1e6'; expected a positive number"),
        ({"rope_theta": 0}, "rope_theta of .* is 0; expected a positive number"),
        ({"rope_parameters": {"rope_theta": None, "rope_type": "default"}}, "rope_theta is None; expected"),
        (
            {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "has rope_theta 1000000.0 and rope_parameters with rope_theta 10000.0",
        ),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "has rope_scaling .* and rope_parameters {}: readers disagree",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope type 'yarn' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ({"num_attention_heads": "4"}, r"config.json cannot be read: .*num_attention_heads"),
        ({"hidden_size": None}, r"config.json cannot be read: .*hidden_size"),
    ],
)
def test_configs_that_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    """With the name of the field, as every user error, and before transformers fails in a way of its own."""
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        architecture(load_hf_config(_directory(tmp_path, **config), {}))


@pytest.mark.parametrize("kind", ["auto_map", "tokenizer"])
def test_code_beside_a_model_is_not_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor offered to be run: a config or tokenizer that needs code of its own is refused, whatever the answer."""
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if kind == "auto_map":
        directory = _directory(tmp_path, model_type="custom", auto_map={"AutoConfig": "code.Config"})
        with pytest.raises(ValueError, match=r"'custom' has custom code \(auto_map\), which is never run"):
            load_hf_config(directory, {})
    else:
        auto = {"auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}, "tokenizer_class": "Custom"}
        _directory(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(auto))
        (tmp_path / "vocab.json").write_text("{}")
        with pytest.raises(ValueError, match="cannot be read"):
            load_tokenizer(tmp_path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("text", ["[" * 99999, "{", "[]", "null", '"qwen2"', ""])
def test_a_config_that_is_no_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load_hf_config(str(tmp_path), {})


@pytest.mark.parametrize(
    ("config", "overrides", "expected"),
    [
        ({"rope_theta": 1e4}, {"rope_theta": 5e6}, (5e6, None, None)),
        ({}, {"rope_theta": 5000000}, (5e6, None, None)),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
            {"rope_theta": 5e6},
            (5e6, 4.0, None),
        ),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, {"rope_theta": 1e6}, (1e6, None, 8.0)),
        ({"rope_theta": 5e5}, {"rope_scaling": {"type": "linear", "factor": 2.0}}, (5e5, 2.0, None)),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, {"rope_scaling": None}, (5e5, None, None)),
        ({"rope_theta": 5e5}, {"rope_scaling": LLAMA3, "rope_theta": 1e6}, (1e6, None, 8.0)),
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 1e6}}, (1e6, None, None)),
        (
            {"rope_theta": 5e5},
            {"rope_parameters": {"type": "linear", "factor": 2.0}, "rope_theta": 1e6},
            (1e6, 2.0, None),
        ),
    ],
)
def test_overrides_of_rotary_embeddings(
    config: dict[str, Any], overrides: dict[str, Any], expected: tuple[Any, ...], tmp_path: Path
) -> None:
    """Either spelling reaches what is computed: base, linear factor, Llama 3's factor."""
    arch = architecture(load_hf_config(_directory(tmp_path, **config), overrides))
    assert (arch.rope_theta, arch.rope_interpolation, arch.rope_llama3_factor) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rope_theta": "many"}, r"model\.overrides\.rope_theta is 'many'; expected a positive number"),
        ({"rope_theta": -1.0}, r"model\.overrides\.rope_theta is -1\.0; expected"),
        ({"rope_scaling": "linear"}, r"model\.overrides\.rope_scaling: 'linear' must be a mapping"),
        ({"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ({"rope_scaling": None, "rope_parameters": None}, "two spellings of the same setting: give only one"),
        ({"rope_parameters": {"rope_theta": 1e6}}, r"give its rope_type \('default' for none\)"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 1e6},
            "rope_theta 1000000.0 and rope_parameters' 10000.0 differ",
        ),
        ({"num_attention_heads": "4"}, r"model\.overrides\.num_attention_heads: .*expected int"),
        ({"rope_base": 1e6}, r"model\.overrides\.rope_base: the llama config does not have this field"),
    ],
)
def test_overrides_that_are_refused(overrides: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = _directory(tmp_path, rope_theta=5e5, rope_scaling=LLAMA3)
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        architecture(load_hf_config(path, overrides))


@pytest.mark.parametrize(
    ("given", "theta", "scaling"),
    [
        ({"rope_theta": 1e6}, 1e6, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 1e6, None),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, 5e5, LLAMA3),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, 5e5, LLAMA3),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
            1e4,
            {"type": "linear", "rope_type": "linear", "factor": 4.0},
        ),
    ],
)
def test_both_spellings(given: dict[str, Any], theta: float, scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    """Old and new readers find the same, whichever one was there; writing it twice changes nothing."""
    written = in_both_spellings({**BASE, **given})
    assert (written["rope_theta"], written["rope_scaling"]) == (theta, scaling)
    kind = {"rope_type": "default"} if scaling is None else _without(scaling, "type")
    assert written["rope_parameters"] == {**kind, "rope_theta": theta}
    assert in_both_spellings(written) == written
    found = [
        load_hf_config(_directory(tmp_path, **{k: v for k, v in written.items() if k not in left_out}), {})
        for left_out in ((), ("rope_parameters",), ("rope_theta", "rope_scaling"))
    ]
    assert len({str(architecture(config)) for config in found}) == 1


def test_linear_rope_is_kept_and_others_are_refused(tmp_path: Path) -> None:
    """A factor of 2.5 is what Megatron-Core divides positions by."""
    scaled = _directory(tmp_path, rope_theta=1e4, rope_scaling={"rope_type": "linear", "factor": 2.5})
    assert architecture(load_hf_config(scaled, {})).rope_interpolation == 2.5


def test_top_one_of_normalized_experts_is_refused(tmp_path: Path) -> None:
    """Megatron-Core does not build it; more active experts than there are cannot be."""
    experts = {"num_experts": 4, "moe_intermediate_size": 8, "decoder_sparse_step": 1, "mlp_only_layers": []}
    for active, normalized, message in ((1, True, "num_experts_per_tok 1 with"), (5, False, "between 1 and the 4")):
        config = {**experts, "model_type": "qwen3_moe", "num_experts_per_tok": active, "norm_topk_prob": normalized}
        with pytest.raises(ValueError, match=message):
            architecture(load_hf_config(_directory(tmp_path, **config), {}))
