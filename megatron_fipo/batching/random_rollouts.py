"""Random responses for a dry run: the memory and the kernels of an update, without a rollout engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_fipo.batch import Rollouts, routing_dtype
from megatron_fipo.config import Config
from megatron_fipo.data import Prompt
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.shapes.architecture import Architecture


def random_rollouts(
    groups: Sequence[int], prompts: Sequence[Prompt], arch: Architecture, config: Config, topology: Topology
) -> Rollouts:
    """Return random responses and advantages for this replica's share of `groups`; one response has the full length.

    With random experts where updates replay those of the rollout engine.
    """
    rollout = config.rollout
    generator = torch.Generator().manual_seed(config.run.seed + topology.dp.rank())
    size = rollout.group_size
    ids = [group * size + i for group in groups[topology.dp.rank() :: topology.dp.size()] for i in range(size)]
    lengths = torch.randint(1, rollout.max_response_tokens + 1, (len(ids),), generator=generator).tolist()
    if lengths:
        lengths[0] = rollout.max_response_tokens
    responses = [torch.randint(0, arch.vocab_size, (n,), generator=generator).tolist() for n in lengths]
    asked = [prompts[i // size % len(prompts)].token_ids for i in ids]
    routing = None
    if config.moe.routing_replay == "rollout":
        routing = [random_routing(len(p) + n - 1, arch, generator) for p, n in zip(asked, lengths, strict=True)]
    rollouts = Rollouts.from_responses(
        ids=ids,
        prompts=asked,
        responses=responses,
        log_probs=[[0.0] * n for n in lengths],
        truncated=[False] * len(ids),
        routing=routing,
    )
    return rollouts.replace(advantages=torch.randn(len(ids), generator=generator))


def random_routing(inputs: int, arch: Architecture, generator: torch.Generator) -> torch.Tensor:
    """Return random experts for the inputs of a response, `[inputs, L, K]`, different ones for each token."""
    assert arch.experts is not None
    scores = torch.rand(inputs, arch.num_layers, arch.experts.count, generator=generator)
    return scores.topk(arch.experts.active).indices.to(routing_dtype(arch.experts.count))
