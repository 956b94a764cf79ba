"""Layouts: what `train` accepts, the planner accepts and Megatron-Core builds is the same, over all sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_fipo.config import Config, ModelConfig, ParallelConfig
from megatron_fipo.config.problems import layout_problems as world_problems
from megatron_fipo.model.architecture import Architecture, Experts
from megatron_fipo.model.build import build_policy, transformer_config
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.scaling.cost.model_shapes import shape_of
from megatron_fipo.scaling.planner.legal_layouts import layout_problems as planner_problems
from megatron_fipo.shapes.layout import layout_problems, stage_layers

ARCH = Architecture(
    model_type="qwen2",
    num_layers=8,
    hidden_size=32,
    ffn_hidden_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=64,
    max_position_embeddings=128,
    rope_theta=1e4,
    rope_interpolation=None,
    norm_eps=1e-6,
    tied_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
)


def _accepted_by_train(arch: Architecture, p: ParallelConfig) -> bool:
    return not world_problems(p) and not layout_problems(arch, p)


def _accepted_by_planner(arch: Architecture, p: ParallelConfig) -> bool:
    return not planner_problems(shape_of(arch), p)


# Layers to stages


def _megatron_deals(layers: int, p: ParallelConfig) -> list[list[range]] | None:
    """The layers of each stage's chunks by Megatron's own functions; None where it refuses, or they do not add up."""
    try:
        config = TransformerConfig(
            num_layers=layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=p.pipeline,
            virtual_pipeline_model_parallel_size=p.virtual_pipeline if p.virtual_pipeline > 1 else None,
            num_layers_in_first_pipeline_stage=p.first_stage_layers,
            num_layers_in_last_pipeline_stage=p.last_stage_layers,
            pipeline_dtype=torch.float32,
        )
        stages = []
        for stage in range(p.pipeline):
            chunks = []
            for chunk in range(p.virtual_pipeline):
                vp_stage = chunk if p.virtual_pipeline > 1 else None
                count = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=stage)
                first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=stage)
                chunks.append(range(first, first + count))
            stages.append(chunks)
    except (ValueError, AssertionError, ZeroDivisionError):
        return None
    in_order = [n for chunk in range(p.virtual_pipeline) for stage in stages for n in stage[chunk]]
    return stages if in_order == list(range(layers)) and all(itertools.chain(*stages)) else None


def _stagings() -> Iterator[tuple[int, ParallelConfig]]:
    ends: list[int | None] = [None, 0, 1, 2, 3, 4, 6]
    sizes = itertools.product(range(1, 13), range(1, 5), range(1, 4), ends, ends)
    for layers, pipeline, virtual, first, last in sizes:
        yield (
            layers,
            ParallelConfig(
                world_size=pipeline,
                pipeline=pipeline,
                virtual_pipeline=virtual,
                first_stage_layers=first,
                last_stage_layers=last,
            ),
        )


def test_layers_are_dealt_as_megatron_does() -> None:
    """7,056 combinations of layers, stages, chunks and ends: `train`, the planner and Megatron-Core's own functions
    accept the same ones, and deal out the same numbers of layers, each layer once and in order."""
    accepted = 0
    for layers, p in _stagings():
        arch = replace(ARCH, num_layers=layers)
        dealt = _megatron_deals(layers, p) if not world_problems(p) else None
        verdicts = (_accepted_by_train(arch, p), _accepted_by_planner(arch, p), dealt is not None)
        assert len(set(verdicts)) == 1, (layers, p, verdicts)
        if dealt is not None:
            accepted += 1
            assert stage_layers(layers, p) == [sum(map(len, stage)) for stage in dealt]
    assert 200 < accepted < 1000  # neither all nor none, and no accident of the ranges


@pytest.mark.parametrize(
    ("layers", "pipeline", "virtual", "first", "last"), [(8, 2, 2, 2, 6), (8, 2, 2, 4, 4), (12, 2, 3, 3, 9)]
)
def test_two_ends_and_nothing_between_are_not_interleaved(
    layers: int, pipeline: int, virtual: int, first: int, last: int
) -> None:
    """Megatron-Core would divide by the number of stages between, on the second stage. With either end alone it does
    not, which deals out the layers in the same way."""
    p = ParallelConfig(
        world_size=2,
        pipeline=pipeline,
        virtual_pipeline=virtual,
        first_stage_layers=first,
        last_stage_layers=last,
    )
    with pytest.raises(ValueError, match=rf"first_stage_layers {first} and last_stage_layers {last} .* set only one"):
        stage_layers(layers, p)
    assert stage_layers(layers, replace(p, last_stage_layers=None)) == [first, last]
    assert stage_layers(layers, replace(p, first_stage_layers=None)) == [first, last]


def test_layers_that_do_not_divide_show_the_arithmetic() -> None:
    """10 layers, of which the first stage takes 3, over 2 further stages."""
    p = ParallelConfig(world_size=3, pipeline=3, first_stage_layers=3)
    with pytest.raises(
        ValueError, match=r"10 layers - 3 \(first/last stage\) = 7 over 2 pipeline stages leaves a remainder of 1"
    ):
        stage_layers(10, p)


def test_one_stage_has_no_first_and_last() -> None:
    """It is both, and cannot be of two sizes."""
    for ends in ({"first_stage_layers": 8}, {"first_stage_layers": 4, "last_stage_layers": 4}):
        p = ParallelConfig(world_size=1, **ends)  # type: ignore[arg-type]
        assert not _accepted_by_train(ARCH, p)
        assert not _accepted_by_planner(ARCH, p)


# Tensors to ranks


def _megatron_builds(arch: Architecture, p: ParallelConfig) -> bool:
    """Whether Megatron-Core makes its groups and builds the model, on the first and the last rank of such a world."""
    config = Config(model=ModelConfig(dtype="float32"), parallel=p)
    return all(_builds_on(rank, arch, config) for rank in {0, p.world_size - 1})


def _builds_on(rank: int, arch: Architecture, config: Config) -> bool:
    p = config.parallel
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=p.world_size)
    try:
        transformer_config(arch, config)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=p.tensor,
            pipeline_model_parallel_size=p.pipeline,
            virtual_pipeline_model_parallel_size=p.virtual_pipeline if p.virtual_pipeline > 1 else None,
            context_parallel_size=p.context,
            expert_model_parallel_size=p.expert,
            expert_tensor_parallel_size=1,
            create_gloo_process_groups=False,
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        topology = Topology(groups, dist.group.WORLD, p.virtual_pipeline, p.sequence_alignment, torch.device("cpu"))  # type: ignore
        chunks = build_policy(arch, config, topology)
        return len(chunks) == p.virtual_pipeline and all(len(chunk.decoder.layers) for chunk in chunks)
    except (ValueError, AssertionError, RuntimeError, ZeroDivisionError):
        return False
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@st.composite
def _layouts(draw: st.DrawFn) -> tuple[Architecture, ParallelConfig]:
    """A dense model or one with experts, and a layout that may or may not fit it."""
    kv_heads = draw(st.sampled_from([1, 2, 3, 4]))
    experts = draw(st.sampled_from([None, None, 2, 3, 4, 6]))
    arch = replace(
        ARCH,
        num_layers=2,
        num_kv_heads=kv_heads,
        num_heads=kv_heads * draw(st.sampled_from([1, 2, 3, 4])),
        head_dim=draw(st.sampled_from([2, 8, 12])),
        ffn_hidden_size=draw(st.sampled_from([32, 36, 40])),
        model_type="qwen3_moe" if experts else "qwen2",
        qkv_bias=not experts,
        experts=Experts(experts, 2, 16, normalized=True) if experts else None,
    )
    tensor, context = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.sampled_from([1, 1, 2]))
    pipeline = draw(st.sampled_from([1, 2]))
    p = ParallelConfig(
        world_size=tensor * context * pipeline * draw(st.sampled_from([1, 2, 3])),
        tensor=tensor,
        context=context,
        pipeline=pipeline,
        sequence=tensor > 1,
        expert=draw(st.sampled_from([1, 2, 3, 4])) if experts else 1,
    )
    return arch, p


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(_layouts())
def test_what_is_accepted_is_what_megatron_builds(layout: tuple[Architecture, ParallelConfig]) -> None:
    """Heads, key/value heads, MLPs and experts over ranks: `train` and the planner agree, and Megatron-Core, asked to
    make its groups and to build the model, agrees as well.

    It would build one thing that is refused: experts under tensor parallelism that are not dealt out, whose gradients
    it would not add up.
    """
    arch, p = layout
    train, planner = _accepted_by_train(arch, p), _accepted_by_planner(arch, p)
    assert train == planner, (layout_problems(arch, p), planner_problems(shape_of(arch), p))
    builds = _megatron_builds(arch, p)
    if arch.experts and p.tensor > 1 and p.expert == 1:
        assert not train
    else:
        assert train == builds, (arch, p, layout_problems(arch, p))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "tensor", "possible"),
    [
        (4, 2, 16, 4, True),  # two ranks share a key/value head
        (8, 1, 8, 8, True),
        (6, 3, 8, 6, True),
        (4, 2, 16, 3, False),
        (12, 3, 8, 2, False),  # 2 is neither a multiple nor a divisor of 3
        (12, 4, 8, 6, False),
        (16, 1, 4, 16, False),  # (16 + 2) x 4 rows of the fused projection / 16
        (4, 2, 16, 8, False),  # no query head for every second rank
    ],
)
def test_key_value_heads_over_ranks(heads: int, kv_heads: int, head_dim: int, tensor: int, possible: bool) -> None:
    """Ranks share a key/value head where they are a multiple of the heads; Megatron-Core says the same."""
    arch = replace(ARCH, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, num_layers=1)
    p = ParallelConfig(world_size=tensor, tensor=tensor)
    arch = replace(arch, ffn_hidden_size=48 * tensor)
    assert [_accepted_by_train(arch, p), _accepted_by_planner(arch, p), _megatron_builds(arch, p)] == [possible] * 3
