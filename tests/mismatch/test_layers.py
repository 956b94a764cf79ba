"""The trainer beside the engine's model: healthy, with planted faults, and in every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.actor import FIPOActor
from megatron_fipo.batch import Rollouts
from megatron_fipo.convert.load import named_parameters
from megatron_fipo.mismatch.comparison import ComparedResponse, compare_responses, packed_log_probs
from megatron_fipo.mismatch.findings import Component, components, first_beyond_rounding
from megatron_fipo.model.architecture import load_hf_config
from megatron_fipo.rollout import HFEngine
from tests.support.actors import actor_of
from tests.support.families import make_checkpoint
from tests.support.policies import make_rollouts
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

LAYERS, VOCABULARY = 4, 101
POINTS = ["embedding", *(f"layer {k}" for k in range(LAYERS)), "final norm", "log-probs"]
SCALED, MIRRORED = "layer 2", "layer 1"  # where faults are planted
# Widths of the MLP that fill vector registers: torch's exp has other last bits on the rest of a row.
SIZES: dict[str, dict[str, Any]] = {
    "qwen2": {"intermediate_size": 128, "vocab_size": VOCABULARY},
    "qwen3": {"intermediate_size": 128, "vocab_size": VOCABULARY},
    "llama2": {"intermediate_size": 128, "vocab_size": VOCABULARY},
    "qwen3_moe": {"moe_intermediate_size": 32, "vocab_size": VOCABULARY},
    "mixtral": {"intermediate_size": 128},
}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp2": ("qwen2", {"tensor": 2, "world_size": 2}),
    "tp2_sp": ("qwen2", {"tensor": 2, "sequence": True, "world_size": 2}),
    "pp2": ("qwen2", {"pipeline": 2, "world_size": 2}),
    "pp2_vpp2_recompute": ("qwen2", {"pipeline": 2, "virtual_pipeline": 2, "world_size": 2, "recompute": "full"}),
    "pp2_vpp2_no_layer_first": (
        "qwen3_moe",
        {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layout": "E|t*3||tL", "world_size": 2},
    ),
    "cp2": ("qwen2", {"context": 2, "world_size": 2}),
    "dp2": ("qwen2", {"world_size": 2}),
    "ep2_dp2": ("qwen3_moe", {"expert": 2, "world_size": 2}),
    "ep2_cp2": ("qwen3_moe", {"expert": 2, "context": 2, "world_size": 2}),
    "ep2_tp2_pp2": ("qwen3_moe", {"expert": 2, "tensor": 2, "sequence": True, "pipeline": 2, "world_size": 4}),
}


@dataclass
class Comparison:
    """Result of one comparison on rank 0."""

    responses: list[ComparedResponse]
    packed: list[torch.Tensor]

    @property
    def components(self) -> list[Component]:
        return components(self.responses)

    @property
    def first(self) -> str | None:
        found = first_beyond_rounding(self.components)
        return None if found is None else found.name


Change = Callable[[torch.Tensor], None]
Results = dict[str, Comparison]


@contextmanager
def _changed(actor: FIPOActor, name: str, change: Change) -> Iterator[None]:
    """Change the trainer's weights whose names end so, on every rank, for a while."""
    found = [p.data for full, p in named_parameters(actor.chunks) if full.endswith(name)]
    before = [p.clone() for p in found]
    for p in found:
        change(p)
    try:
        yield
    finally:
        for p, old in zip(found, before, strict=True):
            p.copy_(old)


def _scale(weight: torch.Tensor) -> None:
    weight.mul_(1.25)


def _mirror(weight: torch.Tensor) -> None:
    weight.copy_(weight.flip(0))


def _element(weight: torch.Tensor) -> None:
    weight.view(-1)[7] += 0.5


def _row(weight: torch.Tensor) -> None:
    weight[5] += 0.5


FAULTS: dict[str, tuple[str, Change, str]] = {
    "a matrix": ("layers.2.self_attention.linear_proj.weight", _scale, SCALED),
    "one element": ("layers.3.self_attention.linear_qkv.weight", _element, "layer 3"),
    "embedding of token 5": ("word_embeddings.weight", _row, "embedding"),
    "final norm": ("final_layernorm.weight", _element, "final norm"),
    "head": ("output_layer.weight", _row, "log-probs"),
}
EXPERT_FAULTS: dict[str, tuple[str, Change, str]] = {
    "a matrix": FAULTS["a matrix"],
    "router": ("layers.1.mlp.router.weight", _mirror, MIRRORED),
    "one expert": ("layers.2.mlp.experts.local_experts.0.linear_fc2.weight", _scale, "layer 2"),
}


@contextmanager
def _compared(path: Path, layout: dict[str, Any], dtype: str) -> Iterator[Callable[[], Comparison]]:
    """Yield the comparison, of this rank, and the actor that it compares."""
    parallel = {name: value for name, value in layout.items() if name != "recompute"}
    model = {"dtype": dtype, "recompute": layout.get("recompute", "none")}
    with actor_of(path, parallel=parallel, model=model) as actor:
        hf_config = load_hf_config(str(path), {})
        engine = HFEngine(hf_config, getattr(torch, dtype), actor.topology.device, batch_size=8)
        engine.load_weights(actor.export_weights())
        rollouts = _rollouts()

        def compare() -> Comparison:
            return Comparison(compare_responses(actor, engine.model, rollouts), packed_log_probs(actor, rollouts))

        compare.actor = actor  # type: ignore[attr-defined]
        yield compare


def _rollouts() -> Rollouts:
    return make_rollouts(5, vocab=VOCABULARY, longest=40, seed=4)


def _in_process(path: Path, dtype: str, faults: dict[str, tuple[str, Change, str]]) -> Results:
    """Compare a healthy trainer, and one with each fault."""
    with _compared(path, {}, dtype) as compare:
        results = {"healthy": compare()}
        actor: FIPOActor = compare.actor  # type: ignore[attr-defined]
        for fault, (name, change, _) in faults.items():
            with _changed(actor, name, change):
                results[fault] = compare()
        results["input"] = _with_changed_input(actor, compare)
    return results


def _with_changed_input(actor: FIPOActor, compare: Callable[[], Comparison]) -> Comparison:
    """Compare while layer 2 receives other states than layer 1 puts out, as from a broken pipeline."""

    def hook(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 1.25}

    handle = actor.chunks[0].decoder.layers[2].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        return compare()
    finally:
        handle.remove()


def _in_layout(path: Path, layout: dict[str, Any], moe: bool) -> Results:
    with _compared(path, layout, "float32") as compare:
        results = {"healthy": compare()}
        actor: FIPOActor = compare.actor  # type: ignore[attr-defined]
        for fault in ["a matrix", *["router"] * moe]:
            with _changed(actor, *EXPERT_FAULTS[fault][:2]):
                results[fault] = compare()
    return results


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each family."""
    return {name: make_checkpoint(tmp_path_factory.mktemp(name), name, **sizes) for name, sizes in SIZES.items()}


@pytest.fixture(scope="module")
def alone(paths: dict[str, Path]) -> dict[tuple[str, str], Results]:
    """Results of one process, of each family in each dtype."""
    return {
        (family, dtype): run_ranks(_in_process, 1, path, dtype, EXPERT_FAULTS if _is_moe(family) else FAULTS)[0]
        for family, path in paths.items()
        for dtype in ("float32", "bfloat16")
    }


def _is_moe(family: str) -> bool:
    return family in ("qwen3_moe", "mixtral")


Alone = dict[tuple[str, str], Results]


@pytest.mark.parametrize("family", [f for f in SIZES if not _is_moe(f)])
def test_a_dense_float32_model_has_no_difference(family: str, alone: Alone) -> None:
    """On the CPU every hidden state has the same bits; log-probabilities differ by two float32 steps (values below 16),
    since the trainer's sum of exponentials is another function. Packed micro-batches make no difference either."""
    healthy = alone[family, "float32"]["healthy"]
    assert [c.name for c in healthy.components] == POINTS
    for c in healthy.components[:-1]:
        assert (c.largest, c.relative, c.alone) == (0.0, 0.0, 0.0), c
    head = healthy.components[-1]
    assert head.largest <= 2 * 2**-20
    assert healthy.first is None
    for response, packed in zip(healthy.responses, healthy.packed, strict=True):
        torch.testing.assert_close(response.whole.log_probs, packed, rtol=0, atol=4e-6)


@pytest.mark.parametrize("family", [f for f in SIZES if _is_moe(f)])
def test_experts_differ_by_float32_rounding(family: str, alone: Alone) -> None:
    """Megatron multiplies by the gate before the second matrix of an expert, transformers behind it: alone a layer
    differs by less than its own rounding error, and 3 eps; no token has other experts. The rest has the same bits."""
    healthy = alone[family, "float32"]["healthy"]
    eps = torch.finfo(torch.float32).eps
    found = {c.name: c for c in healthy.components}
    for k in range(LAYERS):
        c = found[f"layer {k}"]
        assert 0 < c.alone < min(3 * eps, 0.8 * c.rounding), c
        assert c.relative < 8 * eps
        assert (c.changed, c.changed_alone, c.unexplained) == (0.0, 0.0, 0)
    assert found["embedding"].largest == found["embedding"].alone == found["final norm"].alone == 0.0
    assert healthy.first is None


@pytest.mark.parametrize("family", SIZES)
def test_bfloat16_differs_by_rounding(family: str, alone: Alone) -> None:
    """Norms round once in the trainer and twice in transformers: each layer alone is within 1.5 times the model's own
    rounding error, though differences add up from layer to layer."""
    healthy = alone[family, "bfloat16"]["healthy"]
    assert healthy.first is None
    assert healthy.components[LAYERS].relative > 3 * healthy.components[LAYERS].alone
    for c in healthy.components:
        assert c.times < 1.5, c
        assert c.token_times < 5, c


HIDDEN = ("bfloat16", "one element")  # a fault that is smaller than what rounding does
CASES = [
    (family, dtype, fault)
    for family in SIZES
    for dtype in ("float32", "bfloat16")
    for fault in (EXPERT_FAULTS if _is_moe(family) else FAULTS)
    if (dtype, fault) != HIDDEN
]


@pytest.mark.parametrize(("family", "dtype", "fault"), CASES)
def test_a_planted_fault_is_named(family: str, dtype: str, fault: str, alone: Alone) -> None:
    """A weight that only the trainer has changed: its component is the first and the only one that is named."""
    expected = (EXPERT_FAULTS if _is_moe(family) else FAULTS)[fault][2]
    found = alone[family, dtype][fault]
    assert found.first == expected
    assert [c.name for c in found.components if c.is_beyond_rounding] == [expected]
    healthy = alone[family, dtype]["healthy"].components
    for c, before in zip(found.components, healthy, strict=True):
        if c.name != expected:  # alone, nothing of the fault reaches another component
            assert (c.alone, c.rounding) == (before.alone, before.rounding)
        if POINTS.index(c.name) < POINTS.index(expected):
            assert c == before
    for c in found.components[POINTS.index(expected) :]:
        assert c.relative > healthy[POINTS.index(c.name)].relative


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_float32_shows_smaller_faults(family: str, alone: Alone) -> None:
    """One element of a matrix is far above the rounding of float32, and inside that of bfloat16, where it is not named
    but makes the layer's difference larger than without it."""
    exact, rough = (alone[family, dtype]["one element"].components[4] for dtype in ("float32", "bfloat16"))
    assert exact.times > 1000
    assert rough.times < 4
    assert rough.alone > alone[family, "bfloat16"]["healthy"].components[4].alone


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_worst_token_is_named(dtype: str, alone: Alone) -> None:
    """A fault in the embedding of token 5 is found where that token is; its row changed by 0.5 everywhere."""
    found = alone["qwen2", dtype]["embedding of token 5"]
    worst = found.components[0].worst
    sequence = _rollouts().select(torch.tensor([worst.response])).tokens
    assert sequence[worst.position] == 5
    assert found.components[0].largest == pytest.approx(0.5, abs=1e-2)
    assert worst.difference == float(max(r.alone.relative[0].max() for r in found.responses))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_routing_is_named(family: str, alone: Alone) -> None:
    """Mirrored rows of a router: most tokens get other experts there, whole and alone; and the reason says so."""
    found = alone[family, "float32"]["router"]
    layer = found.components[POINTS.index(MIRRORED)]
    assert layer.changed == layer.changed_alone > 0.5
    assert layer.unexplained > 0.5 * sum(r.whole.relative.shape[1] for r in found.responses)
    assert layer.reason == f"other experts although the logits are not close, tokens: {layer.unexplained}"
    assert found.components[POINTS.index(MIRRORED) + 1].changed_alone == 0.0


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_state_that_changes_on_its_way(family: str, dtype: str, alone: Alone) -> None:
    """A layer that gets other states than the one before puts out is named, though alone it does not differ."""
    found = alone[family, dtype]["input"]
    assert found.first == "layer 2"
    layer = found.components[3]
    assert layer.disconnected
    assert layer.times < 1.5
    assert [c.name for c in found.components if c.disconnected] == ["layer 2"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_equal_one_process(name: str, paths: dict[str, Path], alone: Alone) -> None:
    """Tokens and layers on other ranks: every token's difference under a planted fault, its experts, the table and what
    it names are those of one process; without one, nothing is named and differences stay rounding."""
    family, layout = LAYOUTS[name]
    found, *others = run_ranks(_in_layout, layout["world_size"], paths[family], layout, _is_moe(family))
    assert all(not comparison.responses for other in others for comparison in other.values())
    expected = alone[family, "float32"]
    for fault, comparison in found.items():
        _assert_equal(comparison, expected[fault])
    assert found["healthy"].first is None
    assert all(c.relative < 2e-6 for c in found["healthy"].components)
    if name in ("pp2", "pp2_vpp2_recompute", "dp2"):  # the same computations, elsewhere
        assert all(c.largest == c.alone == 0 for c in found["healthy"].components[:-1])


def _assert_equal(found: Comparison, expected: Comparison) -> None:
    assert found.first == expected.first
    assert [r.number for r in found.responses] == list(range(5))
    for a, b in zip(found.responses, expected.responses, strict=True):
        for one, other in ((a.whole, b.whole), (a.alone, b.alone)):
            torch.testing.assert_close(one.relative, other.relative, rtol=2e-5, atol=4e-6)
            torch.testing.assert_close(one.largest, other.largest, rtol=2e-5, atol=1e-4)
            torch.testing.assert_close(one.received, other.received, rtol=2e-5, atol=4e-6)
            torch.testing.assert_close(one.log_probs, other.log_probs, rtol=0, atol=5e-5)
            assert (one.experts is None) == (other.experts is None)
            assert one.experts is None or torch.equal(one.experts, other.experts)
    for x, y in zip(found.packed, expected.packed, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=5e-5)
    for c, d in zip(found.components, expected.components, strict=True):
        assert c.alone == pytest.approx(d.alone, rel=2e-5, abs=2e-6)
        assert (c.changed, c.changed_alone, c.unexplained) == (d.changed, d.changed_alone, d.unexplained)
        if c.is_beyond_rounding:
            assert c.worst.response == d.worst.response
            assert c.worst.position == d.worst.position
