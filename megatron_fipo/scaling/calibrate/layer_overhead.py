"""Forward passes of models with negligible arithmetic, whose time is the overhead per layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_fipo.batch import MicroBatch
from megatron_fipo.config import Config, ModelConfig, ParallelConfig
from megatron_fipo.model.build import build_policy
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.scaling.cost.model_shapes import make_shape, plain_architecture


@contextmanager
def narrow_models(
    dtype: torch.dtype, device: torch.device, layers: Sequence[int]
) -> Iterator[list[Callable[[], object]]]:
    """Yield forward passes of models with the given layer counts, so narrow that only per-layer overhead counts."""
    parallel = ParallelConfig(world_size=dist.get_world_size())
    model_config = ModelConfig(dtype="bfloat16" if dtype == torch.bfloat16 else "float32")
    config = replace(Config(), parallel=parallel, model=model_config)
    topology = topologies.initialize(parallel, seed=1)
    try:
        passes: list[Callable[[], object]] = []
        for count in layers:
            shape = make_shape(count, hidden=128, ffn=256, heads=2, vocab=256, model_type="qwen2", qkv_bias=True)
            (model,) = build_policy(plain_architecture(shape), config, topology)
            for parameter in model.parameters():
                torch.nn.init.constant_(parameter, 0.01)
            passes.append(torch.no_grad()(lambda model=model: model(_few_tokens(device))))
        yield passes
    finally:
        topologies.destroy()


def _few_tokens(device: torch.device, count: int = 16) -> MicroBatch:
    """Return one short sequence, packed as in training."""
    positions = torch.arange(count, device=device)
    ends = torch.tensor([0, count], device=device)
    nothing = torch.zeros(count, device=device)
    return MicroBatch(
        input_ids=positions,
        position_ids=positions,
        is_padding=torch.zeros(count, dtype=torch.bool, device=device),
        cu_seqlens=ends.int(),
        padded_lengths=(count,),
        hidden_index=positions,
        targets=positions,
        response_index=positions,
        segment_offsets=ends,
        loss_mask=torch.ones(count, dtype=torch.bool, device=device),
        response_offsets=ends,
        advantages=nothing[:1],
        sequence_index=positions[:1],
        rollout_log_probs=nothing,
    )
