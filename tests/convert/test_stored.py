"""Checkpoints that keep all experts of a layer in one tensor, and such as store a tied output layer as well."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_fipo.convert import conversion, export
from megatron_fipo.convert.conversion import to_huggingface, to_megatron
from megatron_fipo.convert.export import save_checkpoint
from megatron_fipo.convert.huggingface import INDEX
from megatron_fipo.convert.load import check_weights
from megatron_fipo.convert.stored import StoredCheckpoint
from megatron_fipo.convert.verify import verify
from megatron_fipo.model.architecture import architecture, load_hf_config
from tests.support.families import make_checkpoint

Tensors = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"
FAMILIES = ["qwen3_moe", "mixtral"]
LAYER = "model.layers.1."


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Return each family's checkpoints: as published, and as transformers 5 writes a model in its own form."""
    root = tmp_path_factory.mktemp("fused")
    found = {}
    for family in FAMILIES:
        published = make_checkpoint(root / family, family, num_hidden_layers=2)
        fused = root / f"{family}-fused"
        model = AutoModelForCausalLM.from_pretrained(published)
        model.save_pretrained(fused, save_original_format=False)
        found[family] = (published, fused)
    return found


def _arch(path: Path) -> Any:
    return architecture(load_hf_config(str(path), {}))


def _weights(path: Path) -> Tensors:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


# Experts


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_experts_read_as_the_published_ones(family: str, checkpoints: dict[str, tuple[Path, Path]]) -> None:
    """Every tensor under its published name, whole and in slices of rows and columns."""
    published, fused = checkpoints[family]
    assert any(name.endswith("experts.gate_up_proj") for name in _weights(fused))
    stored = StoredCheckpoint(fused, _arch(fused))
    wanted = _weights(published)
    _assert_same({name: stored.source(name)[:] for name in stored.shapes}, wanted)
    for name, tensor in wanted.items():
        assert stored.shapes[name] == tuple(stored.source(name).get_shape()) == tuple(tensor.shape)
        assert torch.equal(stored.source(name)[3:7], tensor[3:7])
        if tensor.dim() == 2:
            assert torch.equal(stored.source(name)[:, 5:9], tensor[:, 5:9])
            assert torch.equal(stored.source(name)[2:4, 5:9], tensor[2:4, 5:9])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_gives_back_the_form(
    family: str, checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """To Megatron and back, names, shapes and every bit are those of the fused source; the Megatron checkpoint is that
    of the published form."""
    published, fused = checkpoints[family]
    to_megatron(fused, tmp_path / "megatron")
    assert verify(published, tmp_path / "megatron").differences == []
    assert verify(fused, tmp_path / "megatron").differences == []
    to_huggingface(tmp_path / "megatron", tmp_path / "back")
    _assert_same(_weights(tmp_path / "back"), _weights(fused))
    to_huggingface(tmp_path / "megatron", tmp_path / "other", config=published)
    _assert_same(_weights(tmp_path / "other"), _weights(published))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_policy_has_the_form_of_its_source(
    family: str, checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Weights come expert by expert, in any order, and the export is what transformers loads."""
    published, fused = checkpoints[family]
    weights = reversed(list(_weights(published).items()))
    config = load_hf_config(str(fused), {})
    save_checkpoint(weights, config, str(fused), tmp_path / "policy", write=True)
    _assert_same(_weights(tmp_path / "policy"), _weights(fused))
    loaded, original = (AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "policy", published))
    _assert_same(loaded.state_dict(), original.state_dict())


def test_fused_experts_over_several_files(
    checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index names the tensors of all experts, and the files are read back whole."""
    fused = checkpoints["qwen3_moe"][1]
    for module in (conversion, export):
        monkeypatch.setattr(module, "FILE_BYTES", 60_000)
    to_megatron(fused, tmp_path / "megatron")
    to_huggingface(tmp_path / "megatron", tmp_path / "back")
    index = json.loads((tmp_path / "back" / INDEX).read_text())["weight_map"]
    assert index.keys() == _weights(fused).keys()
    assert len(set(index.values())) > 2
    _assert_same(_weights(tmp_path / "back"), _weights(fused))


def test_an_export_that_lacks_a_part_is_refused(checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """One expert's down projection never came: nothing appears."""
    published, fused = checkpoints["qwen3_moe"]
    weights = {n: t for n, t in _weights(published).items() if n != f"{LAYER}mlp.experts.3.down_proj.weight"}
    with pytest.raises(ValueError, match=r"lacks tensors: model\.layers\.1\.mlp\.experts\.3\.down_proj\.weight"):
        save_checkpoint(iter(weights.items()), load_hf_config(str(fused), {}), str(fused), tmp_path / "p", write=True)
    assert list(tmp_path.iterdir()) == []


def _transposed(tensors: Tensors) -> Tensors:
    name = f"{LAYER}mlp.experts.gate_up_proj"
    return {**tensors, name: tensors[name].transpose(1, 2).contiguous()}


BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "transposed": (_transposed, r"mlp\.experts\.gate_up_proj .*\(6, 64, 48\), .* requires \(6, 48, 64\): experts"),
    "too few experts": (
        lambda t: {**t, f"{LAYER}mlp.experts.down_proj": t[f"{LAYER}mlp.experts.down_proj"][:5].clone()},
        r"mlp\.experts\.down_proj of .* has shape \(5, 64, 24\)",
    ),
    "one is missing": (
        lambda t: {n: x for n, x in t.items() if n != f"{LAYER}mlp.experts.down_proj"},
        r"lacks tensors: model\.layers\.1\.mlp\.experts\.0\.down_proj\.weight",
    ),
    "both forms": (
        lambda t: {**t, f"{LAYER}mlp.experts.2.down_proj.weight": torch.zeros(64, 24)},
        r"has both model\.layers\.1\.mlp\.experts\.down_proj and .*experts\.2\.down_proj\.weight",
    ),
    "another layer": (
        lambda t: {**t, "model.layers.2.mlp.experts.down_proj": torch.zeros(6, 64, 24)},
        r"has unexpected tensors: model\.layers\.2\.mlp\.experts\.down_proj",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_fused_experts_that_do_not_fit(case: str, checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Named, with the shape that is expected."""
    change, message = BROKEN[case]
    path = Path(shutil.copytree(checkpoints["qwen3_moe"][1], tmp_path / "hf"))
    save_file(change(load_file(path / WEIGHTS)), path / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        check_weights(path, _arch(path))


# Tied output layers


def _with_output_layer(path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    tensors = load_file(path / WEIGHTS)
    save_file({**tensors, "lm_head.weight": change(tensors["model.embed_tokens.weight"].clone())}, path / WEIGHTS)
    return path


def _one_number(weight: torch.Tensor) -> torch.Tensor:
    weight[-1, -1] += 1e-3
    return weight


@pytest.mark.parametrize("family", ["qwen2_tied", "qwen3_tied", "llama3_tied"])
@pytest.mark.parametrize(
    "change", [_one_number, torch.zeros_like, lambda w: w[:-1].clone()], ids=["one number", "zeros", "fewer rows"]
)
def test_a_tied_output_layer_that_differs_is_refused(
    family: str, change: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    """When it is loaded, converted or verified: transformers 5 would untie it, transformers 4 and vLLM ignore it."""
    path = make_checkpoint(tmp_path / "hf", family, num_hidden_layers=1)
    to_megatron(path, tmp_path / "megatron")
    _with_output_layer(path, change)
    message = r"tie_word_embeddings=true in config\.json, but lm_head\.weight differs from model\.embed_tokens\.weight"
    for attempt in (
        lambda: check_weights(path, _arch(path)),
        lambda: to_megatron(path, tmp_path / "again"),
        lambda: verify(path, tmp_path / "megatron"),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()


def test_a_tied_output_layer_that_is_the_same_is_ignored(tmp_path: Path) -> None:
    """Some published checkpoints store it."""
    path = _with_output_layer(make_checkpoint(tmp_path / "hf", "qwen2_tied", num_hidden_layers=1), lambda w: w)
    check_weights(path, _arch(path))
    to_megatron(path, tmp_path / "megatron")
    to_huggingface(tmp_path / "megatron", tmp_path / "back")
    assert "lm_head.weight" not in _weights(tmp_path / "back")


def test_untied_by_an_override(tmp_path: Path) -> None:
    """The refusal's advice: the stored output layer is then the model's."""
    path = _with_output_layer(make_checkpoint(tmp_path / "hf", "qwen2_tied", num_hidden_layers=1), _one_number)
    arch = architecture(load_hf_config(str(path), {"tie_word_embeddings": False}))
    assert not arch.tied_embeddings
    assert "lm_head.weight" in check_weights(path, arch).shapes
