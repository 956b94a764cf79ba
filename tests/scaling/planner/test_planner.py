"""Ranking: what fits and is fastest comes first, the memory is the memory model's, and little of it is replayed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import load_config
from megatron_fipo.scaling.cost.hardware import find_hardware
from megatron_fipo.scaling.cost.layout import Layout
from megatron_fipo.scaling.cost.memory import estimated_memory, training_memory
from megatron_fipo.scaling.cost.model_shapes import PUBLISHED, find_model
from megatron_fipo.scaling.cost.sequence_lengths import Sequences, parse_lengths
from megatron_fipo.scaling.planner import memory_check, run_inputs
from megatron_fipo.scaling.planner import planner as planning
from megatron_fipo.scaling.planner.planner import Plan, Planner, scaling

ROOT = Path(__file__).parents[3]
H100 = find_hardware("H100-80")
RECIPE = load_config(ROOT / "examples" / "fipo_32b.yaml")


@pytest.fixture(scope="module")
def planned() -> tuple[Planner, Plan]:
    planner = run_inputs.planner_of(RECIPE, H100)
    return planner, planner.plan(128)


def test_the_recipe_is_planned(planned: tuple[Planner, Plan]) -> None:
    """Its own layout of 128 H100 is legal, fits, and is neither the fastest nor half as fast; problems are none."""
    planner, made = planned
    own = planner.evaluate(Layout.of(RECIPE))
    assert memory_check.recipe_problems(RECIPE, H100) == []
    assert own.fits
    assert made.candidates[0].cost.seconds < own.cost.seconds < 2 * made.candidates[0].cost.seconds
    # 8 updates of 1024 sequences; the trainer's packer never needs fewer micro-batches than the tokens fill
    assert len(own.batch.sizes) >= planner.sequences.tokens / 8 / 22528


@pytest.mark.parametrize(
    ("free", "sizes"),
    [
        ("Et*15|(t*17|)*2,t*15L", {"first_stage_layers": 15, "last_stage_layers": 15}),
        ("Et*8|(t*8|)*6,t*8L", {"virtual_pipeline": 2}),
    ],
)
def test_free_placement_costs_what_its_layers_cost(
    free: str, sizes: dict[str, int], planned: tuple[Planner, Plan]
) -> None:
    """Time and memory of equal layers on equal stages are equal, however a config says it."""
    base = replace(Layout.of(RECIPE).parallel, tensor=4, pipeline=4, first_stage_layers=None, last_stage_layers=None)
    plain = replace(Layout.of(RECIPE), parallel=replace(base, **sizes))
    written = replace(base, virtual_pipeline=sizes.get("virtual_pipeline", 1), pipeline_layout=free)
    found = planned[0].evaluate(replace(plain, parallel=written))
    assert replace(found, layout=plain) == planned[0].evaluate(plain)


def test_a_stage_with_the_embedding_alone_is_idle(planned: tuple[Planner, Plan]) -> None:
    """It computes nothing that is counted, and holds the embedding; the others take its layers."""
    base = replace(Layout.of(RECIPE).parallel, tensor=4, pipeline=4, first_stage_layers=None, last_stage_layers=None)
    layout = replace(Layout.of(RECIPE), parallel=replace(base, pipeline_layout="E|t*22|t*22|t*20L"))
    candidate = planned[0].evaluate(layout)
    first, second = candidate.cost.stages[:2]
    assert first["gemm"] == first["head"] == first["attention"] == 0 < second["gemm"]
    memory = estimated_memory(planned[0].model, H100, layout, 22528.0)[0]
    assert memory.activations == memory.head == 0
    assert memory.parameters == 2 * 5120 * 152064 / 4


def test_candidates_fit_and_are_sorted(planned: tuple[Planner, Plan]) -> None:
    """All use 128 GPUs and fit into 85 GB less what a sleeping engine keeps; the replayed ones come in order."""
    candidates = planned[1].candidates
    assert all(c.layout.parallel.world_size == 128 for c in candidates)
    assert all(c.memory.total <= H100.gpu.memory - run_inputs.SLEEPING_ENGINE for c in candidates)
    replayed = [c.cost.seconds for c in candidates if c.replayed]
    assert replayed == sorted(replayed)
    assert planned[1].rejected > 0


def test_a_thousand_layouts_need_few_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a thousand layouts are ranked with at most 64 packed batches and, for time and messages, 128 replays."""
    counts = {"replay": 0, "pack": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(planning, "pipeline_time", counted("replay", planning.pipeline_time))
    monkeypatch.setattr(planning, "packed_batch", counted("pack", planning.packed_batch))
    made = run_inputs.planner_of(RECIPE, H100).plan(128)
    assert len(made.candidates) + made.rejected > 1000
    assert counts["replay"] <= 128
    assert counts["pack"] <= 64


def test_matrices_are_almost_all_of_the_buffers() -> None:
    """Parameters, gradients and optimizer state of the recipe's stages, counted as matrices, are those of Megatron's
    buffers to 0.1%; activations and head are the same bytes."""
    arch, layout = find_model("qwen2.5-32b"), Layout.of(RECIPE)
    for stage, found in enumerate(estimated_memory(arch, H100, layout, float(layout.tokens_per_micro_batch))):
        exact = training_memory(arch, RECIPE, stage)
        assert found.parameters == pytest.approx(exact.parameters, rel=1e-3)
        assert found.gradients == pytest.approx(exact.gradients, rel=1e-3)
        assert found.optimizer == pytest.approx(exact.optimizer, rel=1e-3)
        assert (found.activations, found.head) == (exact.activations, exact.head)
        assert found.reserve > 0.1 * (found.total - found.reserve)


def test_nothing_fits() -> None:
    """Llama 3 405B on 8 H100: no candidate, and the nearest one misses what it says."""
    made = Planner(PUBLISHED["llama3-405b"], H100, Sequences((2048,) * 8)).plan(8)
    assert made.candidates == ()
    assert made.nearest is not None
    assert made.nearest.spare == made.nearest.gpu_memory - made.nearest.memory.total < 0


def test_long_sequences_are_split() -> None:
    """With 128k tokens and no recomputation, a 32B model only fits where they are split over ranks or in time."""
    planner = Planner(PUBLISHED["qwen2.5-32b"], H100, Sequences((131072,) * 8))
    candidates = planner.plan(64, recompute=("none",)).candidates
    assert candidates
    split = [(c.layout.parallel.context, c.layout.parallel.sequence_chunks) for c in candidates]
    assert all(context > 1 or chunks >= 8 for context, chunks in split)
    assert min(context for context, _ in split) == min(chunks for _, chunks in split) == 1


def test_strong_scaling_loses_efficiency() -> None:
    """Steps get shorter with more GPUs, and each GPU does less of them; the rows start at 100%."""
    planner = Planner(PUBLISHED["qwen2.5-7b"], H100, Sequences((4096,) * 256))
    rows = list(scaling(planner, [16, 64, 256], weak=False))
    assert [row.gpus for row in rows] == [16, 64, 256]
    assert rows[0].efficiency == 1
    assert rows[0].best.cost.seconds > rows[1].best.cost.seconds > rows[2].best.cost.seconds
    assert rows[2].efficiency < rows[1].efficiency


def test_weak_scaling_keeps_the_step() -> None:
    """16 times the GPUs and sequences: 16 times the tokens in about the same time."""
    planner = Planner(PUBLISHED["qwen2.5-7b"], H100, Sequences((4096,) * 64))
    small, large = scaling(planner, [16, 256], weak=True)
    assert large.best.cost.tokens == 16 * small.best.cost.tokens
    assert large.best.cost.seconds == pytest.approx(small.best.cost.seconds, rel=0.15)


def test_large_batches_are_packed_by_one_replicas_share() -> None:
    """A batch of 8,192 sequences over 8 replicas has the tokens of all of them."""
    sequences = parse_lengths("p50=1000,p100=4000", 8192)
    planner = Planner(PUBLISHED["qwen2.5-7b"], H100, sequences)
    batch = planner.batch(planner.layouts(8, 4096, ("full",))[0])
    assert batch.all_tokens == pytest.approx(sequences.tokens, rel=0.01)


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("4096", 3, (4096, 4096, 4096)),
        ("100,200,300", 3, (100, 200, 300)),
        ("100,300", 3, (100, 200, 300)),
        ("p0=100,p50=200,p100=1000", 3, (100, 200, 1000)),
        ("p50=200,p100=1000", 3, (100, 200, 1000)),
    ],
)
def test_lengths(text: str, count: int, expected: tuple[int, ...]) -> None:
    """One length, a sample, or percentiles between which lengths rise evenly."""
    assert parse_lengths(text, count).lengths == expected


@pytest.mark.parametrize("text", ["", "a", "0", "p50=9,p90=3", "p150=3", "100,p50=3"])
def test_lengths_that_are_none(text: str) -> None:
    """Are refused with what can be given."""
    with pytest.raises(ValueError, match="--lengths"):
        parse_lengths(text, 4)
