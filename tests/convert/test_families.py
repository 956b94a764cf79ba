"""Every family, Hugging Face -> Megatron -> Hugging Face: bit for bit, and the same model in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_fipo.actor import FIPOActor
from megatron_fipo.convert.conversion import to_huggingface, to_megatron
from megatron_fipo.convert.load import load_weights
from megatron_fipo.convert.verify import verify
from megatron_fipo.model.check import check_model
from megatron_fipo.parallel import topology as topologies
from tests.support.families import FAMILIES, MOE, make_checkpoint
from tests.support.policies import make_config
from tests.support.ranks import run_ranks

Tensors = dict[str, torch.Tensor]
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "tp2": {"tensor": 2, "sequence": True},
    "tp4": {"tensor": 4},  # two ranks, or all of them, share a key/value head
    "pp2": {"pipeline": 2},
    "tp2_pp2": {"tensor": 2, "pipeline": 2, "sequence": True},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "ep2": {"expert": 2},
    "ep2_pp2": {"expert": 2, "pipeline": 2},
    "ep2_tp4": {"expert": 2, "tensor": 4, "sequence": True},
    "ep2_tp2_pp2": {"expert": 2, "tensor": 2, "pipeline": 2, "sequence": True},
}
# Each takes three seconds, and is in tp2_pp2, tp4 or ep2_tp2_pp2, too.
PARTS_OF_OTHERS = ("tp2", "pp2", "ep2", "ep2_pp2", "ep2_tp4")
TOKENS = torch.randint(0, 60, (4, 24), generator=torch.Generator().manual_seed(5))


def _world(layout: dict[str, Any]) -> int:
    tensor = layout.get("tensor", 1)
    return max(tensor, layout.get("expert", 1)) * layout.get("pipeline", 1)


def _families(layout: dict[str, Any]) -> list[str]:
    """Experts need an MoE model, and that an expert-parallel axis beside a tensor-parallel one."""
    if "expert" in layout:
        return MOE
    return [n for n in FAMILIES if n not in MOE or layout.get("tensor", 1) == 1]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Hugging Face checkpoint of each family, and its conversion."""
    root = tmp_path_factory.mktemp("families")
    paths = {name: (make_checkpoint(root / name, name), root / f"{name}-megatron") for name in FAMILIES}
    for source, converted in paths.values():
        to_megatron(source, converted)
    return paths


@pytest.fixture(scope="module")
def expected(checkpoints: dict[str, tuple[Path, Path]]) -> dict[str, torch.Tensor]:
    """Return the logits of transformers for TOKENS."""
    return {name: _transformers_log_probs(path) for name, (path, _) in checkpoints.items()}


@torch.no_grad()
def _transformers_log_probs(path: Path) -> torch.Tensor:
    logits = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(TOKENS).logits
    return logits[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None]).squeeze(-1)


def _weights(path: Path) -> Tensors:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_gives_back_every_bit(
    family: str, checkpoints: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """The published names and layout come back, transformers loads them, and verify finds no difference."""
    source, converted = checkpoints[family]
    to_huggingface(converted, tmp_path / "back")
    _assert_same(_weights(tmp_path / "back"), _weights(source))
    assert verify(source, converted).differences == []
    loaded, original = (AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "back", source))
    _assert_same(loaded.state_dict(), original.state_dict())
    assert loaded.config.to_diff_dict() == original.config.to_diff_dict()


def _read_both_ways(families: list[str], paths: dict[str, tuple[Path, Path]], layout: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of TOKENS from the converted checkpoint, and the weights that either checkpoint gives."""
    topology, results = None, {}
    for family in families:
        source, converted = paths[family]
        config = make_config(
            converted,  # config.json travels along
            parallel={**layout, "world_size": _world(layout)},
            model={"megatron_path": str(converted)},
        )
        arch = check_model(config)
        topology = topology or topologies.initialize(config.parallel, seed=1)
        actor = FIPOActor(config, arch, topology)
        log_probs = actor.get_inference_log_probs(TOKENS)
        weights = [{n: t.clone() for n, t in actor.export_weights()}]
        for parameter in (p for chunk in actor.chunks for p in chunk.parameters()):
            parameter.data.fill_(float("nan"))
        load_weights(actor.chunks, source, arch, topology)
        weights.append({n: t.clone() for n, t in actor.export_weights()})
        results[family] = (log_probs, weights)
    return results


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=pytest.mark.slow) if name in PARTS_OF_OTHERS else name for name in LAYOUTS]
)
def test_every_layout_is_the_model_that_transformers_loads(
    layout: str, checkpoints: dict[str, tuple[Path, Path]], expected: dict[str, torch.Tensor]
) -> None:
    """Log-probabilities within 1e-5 of transformers', and every bit of the weights, whichever checkpoint they are
    read from."""
    sizes = LAYOUTS[layout]
    families = _families(sizes)
    for results in run_ranks(_read_both_ways, _world(sizes), families, checkpoints, sizes):
        for family in families:
            log_probs, weights = results[family]
            assert (log_probs - expected[family]).abs().max() < 1e-5, family
            for read in weights:
                _assert_same(read, _weights(checkpoints[family][0]))


def test_tensor_parallel_ranks_that_do_not_fit_the_heads(checkpoints: dict[str, tuple[Path, Path]]) -> None:
    """Refused before any rank starts, with the possible sizes."""
    config = make_config(checkpoints["qwen2"][0], parallel={"tensor": 8, "world_size": 8})
    with pytest.raises(
        ValueError, match=r"4 attention heads cannot be .* parallel\.tensor 8: must be one of \[1, 2, 4\]"
    ):
        check_model(config)
