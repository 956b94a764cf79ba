"""Hugging Face -> Megatron shards -> Hugging Face, bit for bit; and checkpoints that are refused, by name."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from megatron_fipo.convert import export, tables
from megatron_fipo.convert.conversion import to_megatron
from megatron_fipo.convert.distributed import load_distributed
from megatron_fipo.convert.export import export_weights, save_checkpoint
from megatron_fipo.convert.huggingface import Checkpoint
from megatron_fipo.convert.load import load_weights, named_parameters
from megatron_fipo.model.architecture import architecture, load_hf_config
from megatron_fipo.model.build import build_policy
from megatron_fipo.model.check import check_model
from megatron_fipo.parallel import topology as topologies
from tests.support.policies import make_config, make_qwen2, save_tokenizer
from tests.support.ranks import run_ranks

MODELS: dict[str, dict[str, Any]] = {
    "untied": {"vocab": 251},
    "tied": {"vocab": 251, "tied": True},
    "vocabulary smaller than a shard": {"vocab": 30, "layers": 2},
}
LAYOUTS: dict[str, dict[str, int]] = {
    "tp1": {},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "tp2_pp2": {"tensor": 2, "pipeline": 2},
}
Tensors = dict[str, torch.Tensor]


def _policy(path: Path, layout: dict[str, Any], dtype: str = "float32") -> tuple[Any, ...]:
    """Chunks whose every number is NaN, architecture and topology."""
    world = layout.get("tensor", 1) * layout.get("pipeline", 1)
    config = make_config(path, model={"dtype": dtype}, parallel={**layout, "world_size": world})
    arch = check_model(config)
    topology = topologies.initialize(config.parallel, seed=1)
    chunks = build_policy(arch, config, topology)
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        parameter.data.fill_(float("nan"))
    return chunks, arch, topology


def _round_trip(models: dict[str, Path], layout: dict[str, Any], out: Path | None) -> dict[str, Tensors]:
    exported = {}
    for name, path in models.items():
        chunks, arch, topology = _policy(path, layout)
        load_weights(chunks, path, arch, topology)
        exported[name] = {n: t.clone() for n, t in export_weights(chunks, arch, topology)}
        if out is not None:
            hf_config = load_hf_config(str(path), {})
            weights = export_weights(chunks, arch, topology)
            save_checkpoint(weights, hf_config, str(path), out / name, write=topology.rank == 0)
        topologies.destroy()
    return exported


def _assert_same(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint, with tokenizer, for each of MODELS."""
    root = tmp_path_factory.mktemp("models")
    paths = {name: make_qwen2(root / name, **options) for name, options in MODELS.items()}
    for path in paths.values():
        save_tokenizer(path)
    return paths


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_gives_back_every_bit(layout: str, models: dict[str, Path], tmp_path: Path) -> None:
    """On every rank, tied or not, with an odd vocabulary; and the saved checkpoint loads in transformers as it was."""
    sizes = LAYOUTS[layout]
    world = sizes.get("tensor", 1) * sizes.get("pipeline", 1)
    expected = {name: load_file(path / "model.safetensors") for name, path in models.items()}
    for exported in run_ranks(_round_trip, world, models, sizes, tmp_path):
        for name in models:
            _assert_same(exported[name], expected[name])
    for name, path in models.items():
        loaded, original = (AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / name, path))
        _assert_same(loaded.state_dict(), original.state_dict())
        assert loaded.config.to_diff_dict() == original.config.to_diff_dict()
        vocabularies = [AutoTokenizer.from_pretrained(p).get_vocab() for p in (tmp_path / name, path)]
        assert vocabularies[0] == vocabularies[1]


def _both_ways(models: dict[str, tuple[Path, Path]], layout: dict[str, Any]) -> dict[str, list[Tensors]]:
    """Export weights loaded from a Hugging Face checkpoint, and those loaded from its conversion."""
    exported: dict[str, list[Tensors]] = {}
    for name, (source, converted) in models.items():
        for load in (load_weights, load_distributed):
            chunks, arch, topology = _policy(source, layout)
            load(chunks, *((source, arch, topology) if load is load_weights else (converted,)))
            exported.setdefault(name, []).append({n: t.clone() for n, t in export_weights(chunks, arch, topology)})
            topologies.destroy()
    return exported


@pytest.mark.distributed
def test_free_placement_gives_back_every_bit(models: dict[str, Path], tmp_path: Path) -> None:
    """A first stage without any layer, unequal chunks, and the head alone in one, tied or not."""
    layout = {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layout": "E|t*4||L"}
    both = {name: (models[name], tmp_path / name) for name in ("untied", "tied")}
    for source, converted in both.values():
        to_megatron(source, converted)
    for exported in run_ranks(_both_ways, 2, both, layout):
        for name, (source, _) in both.items():
            for weights in exported[name]:
                _assert_same(weights, load_file(source / "model.safetensors"))


def _shards(path: Path, dtype: str) -> tuple[Tensors, Tensors]:
    chunks, arch, topology = _policy(path, {"tensor": 2}, dtype)
    load_weights(chunks, path, arch, topology)
    return dict(named_parameters(chunks)), {n: t.clone() for n, t in export_weights(chunks, arch, topology)}


@pytest.mark.distributed
def test_shards_hold_their_rows(models: dict[str, Path]) -> None:
    """Padded vocabulary rows are 0, query, key and value rows stand by group, gate above up: rank by rank."""
    hf = load_file(models["untied"] / "model.safetensors")
    rows = torch.cat([hf["model.embed_tokens.weight"], torch.zeros(256 - 251, 64)])
    prefix, megatron = "model.layers.3.", "decoder.layers.3."
    q, k, v = (hf[f"{prefix}self_attn.{x}_proj.weight"] for x in "qkv")
    for rank, (shard, _) in enumerate(run_ranks(_shards, 2, models["untied"], "float32")):
        half, query, key = slice(128 * rank, 128 * rank + 128), slice(32 * rank, 32 * rank + 32), slice(16 * rank, None)
        assert torch.equal(shard["embedding.word_embeddings.weight"], rows[half])
        qkv = torch.cat([q[query], k[key][:16], v[key][:16]])
        assert torch.equal(shard[f"{megatron}self_attention.linear_qkv.weight"], qkv)
        mlp = slice(48 * rank, 48 * rank + 48)
        gate_up = torch.cat([hf[f"{prefix}mlp.{x}_proj.weight"][mlp] for x in ("gate", "up")])
        assert torch.equal(shard[f"{megatron}mlp.linear_fc1.weight"], gate_up)
        columns = hf[f"{prefix}self_attn.o_proj.weight"][:, query]
        assert torch.equal(shard[f"{megatron}self_attention.linear_proj.weight"], columns)


@pytest.mark.distributed
def test_bfloat16_gives_back_every_bit(tmp_path: Path) -> None:
    """A bfloat16 checkpoint in a bfloat16 model."""
    model = Qwen2ForCausalLM.from_pretrained(make_qwen2(tmp_path / "float32", layers=1)).bfloat16()
    model.save_pretrained(tmp_path / "bfloat16")
    expected = load_file(tmp_path / "bfloat16" / "model.safetensors")
    for _, exported in run_ranks(_shards, 2, tmp_path / "bfloat16", "bfloat16"):
        _assert_same(exported, expected)


def test_table_is_complete_and_one_to_one(models: dict[str, Path]) -> None:
    """The names the table asks for are exactly those of transformers' own model."""
    for name, path in models.items():
        arch = architecture(load_hf_config(str(path), {}))
        stored = load_file(path / "model.safetensors")
        assert tables.huggingface_shapes(arch) == {n: tuple(t.shape) for n, t in stored.items()}, name


def _drop(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def _set(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: torch.zeros(shape)}


def _gate_and_up(gate: int, up: int) -> Callable[[Tensors], Tensors]:
    first = "model.layers.0.mlp."
    return lambda t: {
        **t,
        f"{first}gate_proj.weight": torch.zeros(gate, 64),
        f"{first}up_proj.weight": torch.zeros(up, 64),
    }


BROKEN: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (_drop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight"),
    "missing lm_head": (_drop("lm_head.weight"), "lm_head.weight"),
    "unexpected": (_set("model.layers.2.mlp.bias", 3), "model.layers.2.mlp.bias"),
    "norm": (_set("model.norm.weight", 65), "model.norm.weight"),
    "too few vocabulary rows": (_set("model.embed_tokens.weight", 240, 64), "model.embed_tokens.weight"),
    "too many vocabulary rows": (_set("lm_head.weight", 252, 64), "lm_head.weight"),
    "odd row": (_set("model.layers.1.self_attn.q_proj.weight", 65, 64), "model.layers.1.self_attn.q_proj.weight"),
    "odd column": (_set("model.layers.0.self_attn.o_proj.weight", 64, 65), "model.layers.0.self_attn.o_proj.weight"),
    "sizes that cancel": (_gate_and_up(90, 102), "model.layers.0.mlp.gate_proj.weight"),
    "one dimension": (_set("model.layers.0.mlp.down_proj.weight", 64), "model.layers.0.mlp.down_proj.weight"),
}


def _load_errors(paths: dict[str, Path]) -> dict[str, str]:
    errors = {}
    chunks, arch, topology = _policy(next(iter(paths.values())), {"tensor": 2})
    for name, path in paths.items():
        try:
            load_weights(chunks, path, arch, topology)
            errors[name] = "accepted"
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return errors


@pytest.fixture(scope="module")
def load_errors(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Return the error of each of two tensor-parallel ranks for each of BROKEN."""
    root = tmp_path_factory.mktemp("broken")
    paths = {name: make_qwen2(root / name, vocab=251) for name in BROKEN}
    for name, (change, _) in BROKEN.items():
        save_file(change(load_file(paths[name] / "model.safetensors")), paths[name] / "model.safetensors")
    return run_ranks(_load_errors, 2, paths)


@pytest.mark.distributed
@pytest.mark.parametrize("case", BROKEN)
def test_tensors_that_do_not_fit_are_named(case: str, load_errors: list[dict[str, str]]) -> None:
    """Every rank refuses a missing, unexpected or misshapen tensor with a ValueError that names it."""
    for errors in load_errors:
        assert errors[case].startswith("ValueError: ")
        assert BROKEN[case][1] in errors[case]


def test_damaged_file_is_named(tmp_path: Path) -> None:
    """Half a safetensors file, or bytes that are none."""
    make_qwen2(tmp_path, layers=1)
    file = tmp_path / "model.safetensors"
    for content in (file.read_bytes()[: file.stat().st_size // 2], b"not tensors", b""):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
            Checkpoint(tmp_path)


def test_index_that_names_a_missing_file(tmp_path: Path) -> None:
    """The message names the index and the file."""
    make_qwen2(tmp_path, layers=1)
    names = load_file(tmp_path / "model.safetensors")
    index = {"weight_map": {**dict.fromkeys(names, "model.safetensors"), "lm_head.weight": "model-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index\.json names model-00002\.safetensors, which does not exist"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": []}'])
def test_unreadable_index_is_named(tmp_path: Path, content: str) -> None:
    """An index that is no JSON, or has no map of tensors to files."""
    make_qwen2(tmp_path, layers=1)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        Checkpoint(tmp_path)


def test_directory_without_weights(tmp_path: Path) -> None:
    """The message names the directory."""
    with pytest.raises(ValueError, match=f"{tmp_path} has no"):
        Checkpoint(tmp_path)


def _weights(path: Path) -> Tensors:
    return load_file(path / "model.safetensors")


def test_checkpoint_of_several_files(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut at the size limit, it is read back whole by transformers and by our own reader."""
    path = models["untied"]
    monkeypatch.setattr(export, "FILE_BYTES", 50_000)
    save_checkpoint(iter(_weights(path).items()), load_hf_config(str(path), {}), str(path), tmp_path / "out", True)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    _assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict(), _weights(path))
    checkpoint = Checkpoint(tmp_path / "out")
    _assert_same({name: checkpoint.source(name)[:] for name in checkpoint.shapes}, _weights(path))


def _interrupted(weights: Tensors, kill: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for number, item in enumerate(weights.items()):
        if number == 5 and kill:
            os.kill(os.getpid(), signal.SIGKILL)
        elif number == 5:
            raise RuntimeError("a rank is gone")
        yield item


def _save_and_die(source: Path, out: Path) -> None:
    export.FILE_BYTES = 50_000  # some files are on disk when it dies
    config = load_hf_config(str(source), {})
    save_checkpoint(_interrupted(_weights(source), kill=True), config, str(source), out, write=True)


@pytest.mark.distributed
def test_killed_save_leaves_the_earlier_checkpoint(models: dict[str, Path], tmp_path: Path) -> None:
    """A process killed while it saves leaves no directory of the checkpoint's name, or the one that was there."""
    out = tmp_path / "policy"
    with pytest.raises(RuntimeError, match="-9"):
        run_ranks(_save_and_die, 1, models["untied"], out)
    assert not out.exists()
    make_qwen2(out, layers=1, seed=3)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    with pytest.raises(RuntimeError, match="-9"):
        run_ranks(_save_and_die, 1, models["untied"], out)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    assert [f.name for f in tmp_path.iterdir() if not f.name.startswith(".")] == ["policy"]


def test_failed_save_leaves_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    """An error while the weights come removes what was written."""
    path = models["untied"]
    weights = _interrupted(_weights(path), kill=False)
    with pytest.raises(RuntimeError, match="a rank is gone"):
        save_checkpoint(weights, load_hf_config(str(path), {}), str(path), tmp_path / "policy", write=True)
    assert list(tmp_path.iterdir()) == []


def test_saved_checkpoint_replaces_an_earlier_one(models: dict[str, Path], tmp_path: Path) -> None:
    """Nothing of the earlier directory is left, and others may read the new one as they may any new directory."""
    path, out = models["untied"], tmp_path / "policy"
    (out / "old").mkdir(parents=True)
    mode = out.stat().st_mode
    save_checkpoint(iter(_weights(path).items()), load_hf_config(str(path), {}), str(path), out, write=True)
    assert not (out / "old").exists()
    assert out.stat().st_mode == mode


def test_ranks_that_do_not_write_consume_the_weights(models: dict[str, Path], tmp_path: Path) -> None:
    """The export is collective: every tensor is taken, and no file is made."""
    path = models["untied"]
    weights = iter(_weights(path).items())
    save_checkpoint(weights, load_hf_config(str(path), {}), str(path), tmp_path / "policy", write=False)
    assert next(weights, None) is None
    assert list(tmp_path.iterdir()) == []
