"""A small model and a GPU with round rates, on which times can be counted by hand."""

from __future__ import annotations

from typing import Any

from megatron_fipo.config import ParallelConfig
from megatron_fipo.scaling.cost.hardware import GPU, Efficiency, Hardware, Software
from megatron_fipo.scaling.cost.layout import Layout
from megatron_fipo.scaling.cost.model_shapes import make_shape

SMALL = make_shape(layers=8, hidden=64, ffn=256, heads=8, kv_heads=4, vocab=512)


def round_hardware(**software: Any) -> Hardware:
    """1 TFLOP/s, 100 GB/s of memory, links of 1 GB/s inside nodes of 8 and a network of 0.1 GB/s, all fully reached."""
    gpu = GPU("round", "round", {"bfloat16": 1e12}, 1e9, 1e11, 1e9, 8, 1e8)
    efficiency = Efficiency(
        gemm={"bfloat16": 1.0},
        gemm_width=0.0,
        attention=1.0,
        memory=1.0,
        casts=0.0,
        link=1.0,
        network=1.0,
        layer_seconds=0.0,
        expert_tokens=0.0,
        reserve_bytes=0.0,
        reserve_share=0.0,
    )
    settings = {"context_exposed": 1.0, "step_seconds": 0.0, "straggling": 0.0, **software}
    return Hardware(gpu, efficiency, Software(**settings))


def layout(tokens: int = 128, recompute: Any = "none", **parallel: Any) -> Layout:
    sizes = [parallel.get(axis, 1) for axis in ("tensor", "pipeline", "context")]
    world = sizes[0] * sizes[1] * sizes[2] * parallel.pop("data", 1)
    return Layout(ParallelConfig(world_size=world, **parallel), tokens, recompute)
