"""Rotary embeddings by each token's position are Megatron's of packed sequences, bit for bit, and so are gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_fipo.batch import MicroBatch, pack, zigzag_positions
from tests.gpu.kernels import ROPE, rotated_both_ways
from tests.support.actors import actor_of, batch_of
from tests.support.policies import make_qwen2, make_rollouts
from tests.support.ranks import run_ranks

LENGTHS = [[1], [1, 1, 1], [300, 212], [5, 1, 77, 1], [700]]
ALIGNED = [[4], [4, 4, 8], [300, 212], [8, 4, 96]]  # to twice the context-parallel ranks


def _differences(cases: list[list[int]], dtypes: list[torch.dtype]) -> list[str]:
    found = []
    for lengths in cases:
        for rope in ROPE:
            for dtype in dtypes:
                pairs = rotated_both_ways("cpu", lengths, rope, dtype)
                found += [f"{lengths} {rope} {dtype}" for a, b in pairs if not torch.equal(a, b)]
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(("size", "cases"), [(1, LENGTHS), (2, ALIGNED)], ids=["one rank", "two context ranks"])
def test_it_is_megatrons(size: int, cases: list[list[int]]) -> None:
    """Rotated tokens and gradients of several layouts, kinds of RoPE and precisions."""
    assert run_ranks(_differences, size, cases, [torch.float32, torch.bfloat16]) == [[]] * size


def _layouts(rank: int) -> list[MicroBatch]:
    """Micro-batches of this context-parallel rank of two, aligned as the trainer aligns them."""
    rollouts = make_rollouts(6)
    indices: list[list[int]] = [[0], [1, 2], [], [3, 4, 5]]
    return [pack(rollouts, index, alignment=4, context_size=2, context_rank=rank) for index in indices]


@pytest.mark.parametrize("rank", [0, 1])
def test_micro_batches_carry_these_positions(rank: int) -> None:
    """The positions are those of the zig-zag split of each padded sequence, on both context-parallel ranks."""
    for micro_batch in _layouts(rank):
        expected = torch.cat([zigzag_positions(length, 2, rank) for length in micro_batch.padded_lengths])
        assert torch.equal(micro_batch.position_ids, expected)


def _angles(path: Path) -> list[bool]:
    with actor_of(path) as actor:
        (model,) = actor.chunks
        bounds = [512, 1536, 1024, 512]
        tables = [model._angles(bound) for bound in bounds]
        same = [torch.equal(t, model.rotary_pos_emb(b, packed_seq=True)) for t, b in zip(tables, bounds, strict=True)]
        kept = {t.untyped_storage().data_ptr() for t in tables[1:]}
        return [*same, len(kept) == 1]


@pytest.mark.distributed
def test_fused_rope_gets_megatrons_table(tmp_path: Path) -> None:
    """Bit for bit, of any bound; one table is kept, the longest."""
    assert run_ranks(_angles, 1, make_qwen2(tmp_path, layers=1)) == [[True] * 5]


def _cached(path: Path) -> int:
    with actor_of(path) as actor:
        before = RotaryEmbedding.forward.cache_info().misses
        actor.log_probs(batch_of(actor, make_rollouts(4)))
        return RotaryEmbedding.forward.cache_info().misses - before


@pytest.mark.distributed
def test_megatron_caches_no_tables(tmp_path: Path) -> None:
    """A forward pass leaves nothing in Megatron's cache, which would hold tensors of the GPU, and the model."""
    assert run_ranks(_cached, 1, make_qwen2(tmp_path, layers=1)) == [0]


def _given_to_fused_kernels(path: Path) -> dict[str, object]:
    """Return the rotation that a decoder of fused kernels gets, and the one that Megatron would have given it."""
    given: dict[str, Any] = {}

    def decoder(**arguments: Any) -> torch.Tensor:
        given.update(arguments)
        return arguments["hidden_states"]

    with actor_of(path) as actor:
        (model,) = actor.chunks
        model.config.apply_rope_fusion, model.post_process = True, False
        del model.decoder
        object.__setattr__(model, "decoder", decoder)
        micro_batch = actor.pack(make_rollouts(3), [0, 1, 2])
        model(micro_batch)
        packed = given["packed_seq_params"]
        ends = micro_batch.cu_seqlens
        embedded = model.embedding(micro_batch.input_ids[None], micro_batch.position_ids[None])
        return {
            "bounds": [packed.max_seqlen_q, packed.max_seqlen_kv],
            "ends": all(torch.equal(x, ends) for x in (packed.cu_seqlens_q, packed.cu_seqlens_kv)),
            "format": packed.qkv_format,
            "angles": torch.equal(given["rotary_pos_emb"], model.rotary_pos_emb(512, packed_seq=True)),
            "embedded": torch.equal(given["hidden_states"], embedded),
        }


@pytest.mark.distributed
def test_fused_kernels_get_what_megatron_gives_them(tmp_path: Path) -> None:
    """The table of angles, bounds rounded up, and the embedded tokens."""
    (given,) = run_ranks(_given_to_fused_kernels, 1, make_qwen2(tmp_path, layers=1))
    assert given == {"bounds": [512, 512], "ends": True, "format": "thd", "angles": True, "embedded": True}
