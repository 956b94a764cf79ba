"""Which layouts are legal: against the checks that `train` makes, brute force, and with the nearest ones named."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from megatron_fipo.config import ParallelConfig
from megatron_fipo.config.problems import layout_problems as world_problems
from megatron_fipo.scaling.cost.hardware import find_hardware
from megatron_fipo.scaling.cost.layout import Layout
from megatron_fipo.scaling.cost.model_shapes import PUBLISHED, ModelShape
from megatron_fipo.scaling.planner.legal_layouts import enumerate_layouts, layout_problems, uneven_stages
from megatron_fipo.scaling.planner.memory_fit import memory_problem
from megatron_fipo.shapes.layout import layout_problems as model_problems
from megatron_fipo.shapes.layout import stage_layers
from tests.scaling.shapes import SMALL

MOE = dataclasses.replace(PUBLISHED["mixtral-8x7b"], num_layers=6)
_GPUS = 12


def _combinations() -> list[ParallelConfig]:
    sizes = (1, 2, 3, 4, 5, 6, 8, 12)
    whole = [
        ParallelConfig(world_size=_GPUS, tensor=t, pipeline=p, virtual_pipeline=v, context=c, expert=e, sequence=t > 1)
        for t, p, v, c, e in itertools.product(sizes, sizes, (1, 2, 3), sizes, (1, 2, 3, 4))
    ]
    chunked = [
        dataclasses.replace(p, sequence_chunks=n)
        for p in whole
        if p.virtual_pipeline < 3 and p.context < 3 and p.expert < 3 and p.pipeline > 1
        for n in (2, 4, 8, 16)
    ]
    return whole + chunked


def _is_legal(model: ModelShape, p: ParallelConfig) -> bool:
    """By the checks of the trainer itself."""
    return not world_problems(p) and not model_problems(model, p)


@pytest.mark.parametrize("model", [dataclasses.replace(SMALL, num_layers=12), MOE], ids=["dense", "moe"])
def test_legal_is_what_the_trainer_accepts(model: ModelShape) -> None:
    """For every combination of sizes on 12 GPUs, legal and not, `layout_problems` agrees with the trainer's checks."""
    combinations = _combinations()
    found = [p for p in combinations if not layout_problems(model, p)]
    assert found == [p for p in combinations if _is_legal(model, p)]
    assert 0 < len(found) < len(combinations)


@pytest.mark.parametrize("model", [dataclasses.replace(SMALL, num_layers=12), MOE], ids=["dense", "moe"])
def test_enumeration_is_complete(model: ModelShape) -> None:
    """The even layouts are the legal ones of all combinations, each once; the uneven ones are legal too."""
    layouts = [x.parallel for x in enumerate_layouts(model, _GPUS, [512], ("none",), most_tensor=_GPUS)]
    even = [p for p in layouts if p.first_stage_layers is None and p.virtual_pipeline <= 3 and p.expert <= 4]
    assert set(even) == {p for p in _combinations() if _is_legal(model, p)}
    assert len(layouts) == len(set(layouts))
    assert all(_is_legal(model, p) for p in layouts)


def test_recompute_and_budgets_multiply() -> None:
    """Two budgets and two modes: four layouts for each."""
    one = list(enumerate_layouts(SMALL, 4, [512], ("none",)))
    assert len(list(enumerate_layouts(SMALL, 4, [512, 1024], ("none", "full")))) == 4 * len(one)


def test_replicas_are_limited() -> None:
    """No more of them than sequences."""
    assert max(x.parallel.data for x in enumerate_layouts(SMALL, 8, [512], most_replicas=2)) == 2


@pytest.mark.parametrize(("layers", "stages"), [(64, 2), (64, 4), (61, 16), (28, 3)])
def test_uneven_stages_add_up(layers: int, stages: int) -> None:
    """First, equal stages between and last have all layers, and the last is not heavier than those between."""
    found = list(uneven_stages(layers, stages))
    assert found
    for first, last in found:
        p = ParallelConfig(world_size=stages, pipeline=stages, first_stage_layers=first, last_stage_layers=last)
        dealt = stage_layers(layers, p)
        assert sum(dealt) == layers
        assert dealt[-1] <= max(dealt)
        assert (dealt[0], dealt[-1]) == (first, last)


REFUSED = {
    "heads": (
        {"tensor": 3, "world_size": 6},
        "8 attention heads / tp 3 = 2.67 is not an integer; nearest legal tp: 2 or 4",
    ),
    "world": (
        {"tensor": 4, "pipeline": 2, "world_size": 12},
        "tp 4 x pp 2 x cp 1 = 8 does not divide the 12 GPUs; use 8 or 16 GPUs, or tp 2 x pp 2 x cp 1",
    ),
    "layers": (
        {"pipeline": 3, "world_size": 3},
        "8 layers / (3 stages x 1 chunks) = 2.67: must be an integer and at least 1; nearest legal: pp 2, pp 4, "
        "first_stage_layers 2 with last_stage_layers 3",
    ),
    "chunks": (
        {"pipeline": 2, "virtual_pipeline": 3, "world_size": 2},
        "8 layers / (2 stages x 3 chunks) = 1.33: must be an integer and at least 1; nearest legal: pp 1, vpp 2, "
        "vpp 4, first_stage_layers 4 with last_stage_layers 4",
    ),
    "experts of a dense model": ({"expert": 2, "world_size": 2}, "parallel.expert 2: the model has no experts; use 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_show_the_arithmetic(name: str) -> None:
    """And the nearest legal choices."""
    sizes, message = REFUSED[name]
    assert message in layout_problems(SMALL, ParallelConfig(**sizes))


def test_refusals_of_experts() -> None:
    """8 experts over 3 ranks; and over 4 of a stage that has 6."""
    problems = layout_problems(MOE, ParallelConfig(world_size=12, pipeline=2, expert=3))
    assert "8 experts / ep 3 = 2.67 is not an integer; nearest legal ep: 2 or 4" in problems
    problems = layout_problems(MOE, ParallelConfig(world_size=12, pipeline=2, expert=4))
    assert "ep 4 does not divide the 6 GPUs of a stage (12 / pp 2)" in problems


def test_impossible_memory_names_what_fits() -> None:
    """A 32B model split over two H100: the sum is shown, and the smallest single changes that fit are named."""
    model, hardware = PUBLISHED["qwen2.5-32b"], find_hardware("H100-80")
    whole = Layout(ParallelConfig(world_size=32, tensor=2, sequence=True), 4096, "full")
    message = memory_problem(model, hardware, whole, 4096.0)
    assert message is not None
    assert "needs" in message
    assert "H100-80 has 85.0" in message
    assert message.endswith("it fits with tp 4 or pp 2")
    for change in ({"tensor": 4}, {"pipeline": 2}):
        other = dataclasses.replace(whole, parallel=dataclasses.replace(whole.parallel, **change))
        assert memory_problem(model, hardware, other, 4096.0) is None
