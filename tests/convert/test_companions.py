"""The files beside exported weights: readers of transformers 4 and 5 and of vLLM find the same in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from megatron_fipo.convert.companions import copy_companions, readable_config
from megatron_fipo.convert.conversion import to_huggingface, to_megatron
from megatron_fipo.convert.export import save_checkpoint
from megatron_fipo.model.architecture import architecture, load_hf_config
from tests.support.families import FAMILIES, make_checkpoint
from tests.support.policies import save_tokenizer

Export = Callable[[Path, Path], dict[str, Any]]
LINEAR = {"rope_type": "linear", "rope_theta": 2e4, "factor": 4.0}


def _by_training(source: Path, out: Path) -> dict[str, Any]:
    weights = iter(load_file(source / "model.safetensors").items())
    save_checkpoint(weights, load_hf_config(str(source), {}), str(source), out, write=True)
    return _json(out / "config.json")


def _by_conversion(source: Path, out: Path) -> dict[str, Any]:
    to_megatron(source, out.with_name("megatron"))
    to_huggingface(out.with_name("megatron"), out)
    return _json(out / "config.json")


def _json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text())
    assert isinstance(content, dict)
    return content


def _as_old_readers(config: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Base and scaling by the rules of transformers 4, which knows no rope_parameters."""
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", "default")
    scaling.pop("type", None)
    return config.get("rope_theta", 10000.0), {"rope_type": kind, **scaling}


def _as_new_readers(config: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """The same by those of transformers 5 where it finds rope_parameters."""
    rope = dict(config["rope_parameters"])
    return rope.pop("rope_theta"), rope


EXPORTS: dict[str, Export] = {"training": _by_training, "conversion": _by_conversion}


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e9}}),
        ("llama3", {}),
        ("llama2", {"rope_parameters": LINEAR}),
        ("qwen3_moe", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}),
    ],
)
def test_rotary_embeddings(export: str, family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Base and scaling are the source's, whichever spelling a reader knows."""
    source = make_checkpoint(tmp_path / "hf", family, num_hidden_layers=1, **changes)
    config = EXPORTS[export](source, tmp_path / "out")
    expected = {**FAMILIES[family], **changes}["rope_parameters"]
    for theta, scaling in (_as_old_readers(config), _as_new_readers(config)):
        assert {"rope_theta": theta, **scaling} == expected
    (tmp_path / "old").mkdir()
    old = {name: value for name, value in config.items() if name not in ("rope_parameters", "dtype")}
    (tmp_path / "old" / "config.json").write_text(json.dumps(old))
    read = [architecture(load_hf_config(str(tmp_path / name), {})) for name in ("hf", "out", "old")]
    assert read[0] == read[1] == read[2]


@pytest.mark.parametrize("export", EXPORTS)
def test_a_published_config_of_the_older_spelling(export: str, tmp_path: Path) -> None:
    """rope_theta alone, torch_dtype alone: the export has both, and is read as the source."""
    source = make_checkpoint(tmp_path / "hf", "qwen2", num_hidden_layers=1)
    config = _json(source / "config.json")
    del config["rope_parameters"], config["dtype"]
    (source / "config.json").write_text(json.dumps({**config, "rope_theta": 1e6, "torch_dtype": "float32"}))
    config = EXPORTS[export](source, tmp_path / "out")
    assert _as_old_readers(config) == _as_new_readers(config) == (1e6, {"rope_type": "default"})
    assert (config["dtype"], config["torch_dtype"]) == ("float32", "float32")


@pytest.mark.parametrize("export", EXPORTS)
def test_both_spellings_load(export: str, tmp_path: Path) -> None:
    """This machine's transformers reads an export as its source: config, logits."""
    source = make_checkpoint(tmp_path / "hf", "llama2", num_hidden_layers=1, rope_parameters=LINEAR)
    EXPORTS[export](source, tmp_path / "out")
    tokens = torch.arange(40)[None]
    found, expected = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
        for path in (tmp_path / "out", source)
    )
    assert torch.equal(found, expected)


def test_overrides_are_exported(tmp_path: Path) -> None:
    """The exported config has a run's overrides."""
    source = make_checkpoint(tmp_path / "hf", "qwen2", num_hidden_layers=1)
    hf_config = load_hf_config(str(source), {"rope_theta": 5e6, "max_position_embeddings": 512})
    weights = iter(load_file(source / "model.safetensors").items())
    save_checkpoint(weights, hf_config, str(source), tmp_path / "out", write=True)
    config = _json(tmp_path / "out" / "config.json")
    assert _as_old_readers(config) == _as_new_readers(config) == (5e6, {"rope_type": "default"})
    assert config["max_position_embeddings"] == 512


def test_the_type_is_that_of_the_weights(tmp_path: Path) -> None:
    """A run in bfloat16 of a float32 checkpoint; and --dtype."""
    source = make_checkpoint(tmp_path / "hf", "qwen2", num_hidden_layers=1)
    weights = ((name, tensor.bfloat16()) for name, tensor in load_file(source / "model.safetensors").items())
    save_checkpoint(weights, load_hf_config(str(source), {}), str(source), tmp_path / "trained", write=True)
    to_megatron(source, tmp_path / "megatron", torch.bfloat16)
    to_huggingface(tmp_path / "megatron", tmp_path / "converted", torch.float16)
    for name, dtype in (("trained", "bfloat16"), ("megatron", "bfloat16"), ("converted", "float16")):
        config = _json(tmp_path / name / "config.json")
        assert (config["dtype"], config["torch_dtype"]) == (dtype, dtype)


def test_two_types_are_refused() -> None:
    """Unless one is asked for."""
    config = {"dtype": "float32", "torch_dtype": "bfloat16"}
    with pytest.raises(ValueError, match="dtype float32 and torch_dtype bfloat16: keep one"):
        readable_config(config, None)
    assert readable_config(config, torch.float16) == {"dtype": "float16", "torch_dtype": "float16"}


# Where generation ends


def _named(directory: Path, name: str, eos: Any) -> None:
    file = directory / name
    content = _json(file) if file.is_file() else {}
    file.write_text(json.dumps({**content, "eos_token_id": eos}))


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "expected"),
    [
        ([5, 6, 7], None, True, [5, 6, 7]),
        ([5, 6], [8, 3], True, [3, 5, 6, 8]),
        (None, 9, False, 9),
        (4, [4], False, 4),
        (None, None, True, []),
    ],
)
def test_all_stop_tokens_are_written_back(
    export: str, config: Any, generation: Any, tokenizer: bool, expected: Any, tmp_path: Path
) -> None:
    """The export's generation config, which vLLM and transformers read, names the union; a single one as a number."""
    source = make_checkpoint(tmp_path / "hf", "qwen2", num_hidden_layers=1)
    (source / "generation_config.json").unlink()
    _named(source, "config.json", config)
    if generation is not None:
        _named(source, "generation_config.json", generation)
    if tokenizer:
        eos = save_tokenizer(source).eos_token_id
        expected = sorted({eos, *expected}) if expected else eos
    EXPORTS[export](source, tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == expected
    assert AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == config


@pytest.mark.parametrize("export", EXPORTS)
def test_other_settings_of_generation_stay(export: str, tmp_path: Path) -> None:
    """Temperature, pad token and what else is there."""
    source = make_checkpoint(tmp_path / "hf", "qwen2", num_hidden_layers=1)
    given = {"eos_token_id": [5, 6], "pad_token_id": 5, "temperature": 0.6, "do_sample": True}
    (source / "generation_config.json").write_text(json.dumps(given))
    EXPORTS[export](source, tmp_path / "out")
    assert _json(tmp_path / "out" / "generation_config.json") == given


def test_a_class_s_default_tokens_are_not_written(tmp_path: Path) -> None:
    """A Llama config that names no end is not given token 2, which the class would fill in."""
    source = make_checkpoint(tmp_path / "hf", "llama3", num_hidden_layers=1)
    (source / "generation_config.json").unlink()
    config = _json(source / "config.json")
    for name in ("bos_token_id", "eos_token_id"):
        del config[name]
    (source / "config.json").write_text(json.dumps(config))
    written = _by_training(source, tmp_path / "out")
    assert written.keys().isdisjoint({"bos_token_id", "eos_token_id"})
    assert not (tmp_path / "out" / "generation_config.json").exists()


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json"])
def test_a_broken_file_stops_a_conversion_at_once(name: str, tmp_path: Path) -> None:
    """Before weights are written."""
    source = make_checkpoint(tmp_path / "hf", "qwen2", num_hidden_layers=1)
    save_tokenizer(source)
    to_megatron(source, tmp_path / "megatron")
    (source / name).write_text('{"eos_token_id": [5')
    with pytest.raises(ValueError, match="cannot be read"):
        to_huggingface(tmp_path / "megatron", tmp_path / "out", config=source)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["hf", "megatron"]


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize(("family", "experts"), [("qwen3_moe", 6), ("mixtral", 4)])
def test_number_of_experts(export: str, family: str, experts: int, tmp_path: Path) -> None:
    """transformers 5 writes num_local_experts for all; older readers of Qwen3-MoE want num_experts, else take 128."""
    source = make_checkpoint(tmp_path / "hf", family, num_hidden_layers=1)
    config = EXPORTS[export](source, tmp_path / "out")
    assert (config["num_experts"], config["num_local_experts"]) == (experts, experts)
    assert architecture(load_hf_config(str(tmp_path / "out"), {})) == architecture(load_hf_config(str(source), {}))


def test_two_numbers_of_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="num_experts 4 and num_local_experts 8: keep one"):
        readable_config({"num_experts": 4, "num_local_experts": 8}, None)


def test_links_out_of_a_checkpoint_are_refused(tmp_path: Path) -> None:
    """Whoever made a checkpoint cannot have another file of the user's copied into an export."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (tmp_path / "secret").write_text("mine")
    (source / "config.json").write_text("{}")
    (source / "tokenizer.model").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"tokenizer\.model links to .*secret, outside of the checkpoint"):
        copy_companions(source, target)
    assert list(target.iterdir()) == []


def test_links_of_a_cache_are_followed(tmp_path: Path) -> None:
    """Hugging Face's cache keeps content in blobs/, to which names in snapshots/ lead; a file may have two names."""
    snapshot, target = tmp_path / "models--a" / "snapshots" / "0123", tmp_path / "target"
    blobs = tmp_path / "models--a" / "blobs"
    for directory in (snapshot, blobs, target):
        directory.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/abc")
    (snapshot / "vocab.json").symlink_to("tokenizer.json")
    copy_companions(snapshot, target)
    assert sorted(f.name for f in target.iterdir() if not f.is_symlink()) == [
        "config.json",
        "tokenizer.json",
        "vocab.json",
    ]
