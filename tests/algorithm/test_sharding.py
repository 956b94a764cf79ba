"""Losses whose sequences are split over ranks equal the losses of whole sequences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.algorithm import FIPOLossConfig, aggregate_tokens, all_reduce, finalize, fipo_loss, grpo_loss
from megatron_fipo.config import ParallelConfig
from megatron_fipo.config.loss import AGGREGATIONS
from megatron_fipo.parallel import topology as topologies
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

LENGTHS = [40, 0, 1, 97, 8, 3, 64, 23, 2, 151]  # of the sequences; some have fewer tokens than there are chunks
CONFIG = FIPOLossConfig(influence_clip=(0.8, 1.2), safety_threshold=3.0, dual_clip=4.0, half_life=16.0)
Batch = dict[str, torch.Tensor]


def _batch(dtype: torch.dtype) -> Batch:
    """A policy far enough from the old one that every clip, the safety rule and the veto act."""
    generator = torch.Generator().manual_seed(3)
    size = sum(LENGTHS)
    shift = 0.4 * torch.randn(size, generator=generator, dtype=torch.float64)
    shift[torch.rand(size, generator=generator) < 0.06] = 2.5
    old = -torch.rand(size, generator=generator, dtype=torch.float64)
    return {
        "log_probs": (old + shift).to(dtype),
        "old": old.to(dtype),
        "advantages": torch.tensor([-1.0, 1, -0.5, 0.7, -2, 0, -0.3, 1.2, 0.4, -0.8]).to(dtype),
        "mask": torch.rand(size, generator=generator) > 0.15,
        "token_weights": torch.rand(size, generator=generator).to(dtype),
    }


def _chunk_ends(length: int, chunks: int) -> list[int]:
    """Cuts at awkward places: equal parts, rounded up, so that the last ones may be short or empty."""
    part = -(-length // chunks)
    return [min(part * k, length) for k in range(chunks + 1)]


def _mine(rank: int, size: int, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of this rank's tokens in the whole packed batch, and its segment offsets."""
    held = [rank] if layout == "contiguous" else [rank, 2 * size - 1 - rank]
    chunks = size if layout == "contiguous" else 2 * size
    index, ends, start = [], [0], 0
    for length in LENGTHS:
        cuts = _chunk_ends(length, chunks)
        for k in held:
            index += range(start + cuts[k], start + cuts[k + 1])
            ends.append(len(index))
        start += length
    return torch.tensor(index, dtype=torch.int64), torch.tensor(ends)


def _results(out: Any, extra: torch.Tensor, log_probs: torch.Tensor, group: dist.ProcessGroup | None) -> dict[str, Any]:
    """Sums, added up over the group, and this rank's per-token outputs."""
    (gradient,) = torch.autograd.grad(out.loss_sum, log_probs)
    sums = torch.stack([x.detach().double() for x in (out.loss_sum, out.num_tokens, out.num_sequences, extra)])
    metrics = out.metrics
    if group is not None:
        dist.all_reduce(sums, group=group)
        metrics = all_reduce(metrics, group)
    tokens = {"gradient": gradient, "future_kl": out.future_kl, "weights": out.influence_weights}
    return {"sums": sums, "metrics": finalize(metrics), "tokens": tokens}


def _loss(
    batch: Batch, config: FIPOLossConfig, backend: str, fipo: bool, group: dist.ProcessGroup | None, layout: str
) -> dict[str, Any]:
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    advantages, index = batch["advantages"], torch.arange(sum(LENGTHS))
    if group is not None:
        index, offsets = _mine(group.rank(), group.size(), layout)
        advantages = advantages.repeat_interleave(2 if layout == "zigzag" else 1)
    log_probs = batch["log_probs"][index].requires_grad_()
    arguments = (log_probs, batch["old"][index], advantages, batch["mask"][index], offsets, config)
    function: Any = fipo_loss if fipo else grpo_loss
    out = function(*arguments, batch["token_weights"][index], backend=backend, group=group, layout=layout)
    extra = aggregate_tokens(log_probs, batch["mask"][index], offsets, out, config)
    return {**_results(out, extra, log_probs, group), "index": index}


def _cases(dtype: torch.dtype, backend: str, layout: str, over: str) -> list[dict[str, Any]]:
    """On one rank: every aggregation, FIPO and GRPO, over the named group of a real topology."""
    world = dist.get_world_size()
    axis = {"context": "context", "pipeline": "pipeline"}[over]
    topology = topologies.initialize(ParallelConfig(world_size=world, **{axis: world}), seed=1)
    group = topology.cp if over == "context" else topology.pp
    configs = [replace(CONFIG, aggregation=a, norm_length=100.0) for a in AGGREGATIONS]
    results = [_loss(_batch(dtype), c, backend, fipo, group, layout) for c in configs for fipo in (True, False)]
    topologies.destroy()
    return results


@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("auto", torch.float32)])
@pytest.mark.parametrize(
    ("ranks", "layout", "over"),
    [
        (1, "zigzag", "context"),
        (2, "zigzag", "context"),
        (4, "zigzag", "context"),
        (2, "contiguous", "pipeline"),
        (4, "contiguous", "pipeline"),
    ],
)
def test_split_sequences_equal_whole_ones(ranks: int, layout: str, over: str, backend: str, dtype: torch.dtype) -> None:
    """Loss, counts, every metric, gradient, Future-KL and weights, over a context- and a pipeline-parallel group."""
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    configs = [replace(CONFIG, aggregation=a, norm_length=100.0) for a in AGGREGATIONS]
    whole = [_loss(_batch(dtype), c, backend, fipo, None, layout) for c in configs for fipo in (True, False)]
    assert 0 < whole[0]["metrics"]["vetoed_fraction"] < 1
    for results in run_ranks(_cases, ranks, dtype, backend, layout, over):
        for result, expected in zip(results, whole, strict=True):
            torch.testing.assert_close(result["sums"], expected["sums"], **tolerance)
            assert result["metrics"] == pytest.approx(expected["metrics"], rel=1e-5, abs=1e-7)
            for name, values in result["tokens"].items():
                torch.testing.assert_close(values, expected["tokens"][name][result["index"]], **tolerance)


def _refused(layout: str) -> str:
    tokens, group = torch.zeros(3), dist.group.WORLD
    with pytest.raises(ValueError, match=r"layout|zigzag") as error:
        fipo_loss(tokens, tokens, tokens, tokens > 0, torch.tensor([0, 3]), CONFIG, group=group, layout=layout)  # type: ignore[arg-type]
    return str(error.value)


def test_errors() -> None:
    """An unknown layout, and an odd number of zig-zag segments, are named."""
    assert run_ranks(_refused, 1, "spiral") == ["layout 'spiral' must be 'contiguous' or 'zigzag'"]
    assert run_ranks(_refused, 1, "zigzag") == ["zigzag needs two segments per sequence, but cu_seqlens has 1 segments"]
