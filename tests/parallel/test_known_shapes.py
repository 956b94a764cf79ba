"""Pipelines whose stages know all shapes compute the same bits, with half the messages and no wait for a shape."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_fipo.actor.pipeline import Pipeline
from megatron_fipo.parallel import known_shapes
from megatron_fipo.parallel.known_shapes import KnownShapes
from tests.support.actors import actor_of, batch_of, gradients_of, weights_of
from tests.support.policies import make_qwen2, make_rollouts
from tests.support.ranks import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2": {"pipeline": 2, "world_size": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2, "world_size": 2},
    "pp4": {"pipeline": 4, "world_size": 4},
    "tp2_pp2_vpp2_sp": {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2, "world_size": 4},
    "cp2_pp2": {"context": 2, "pipeline": 2, "world_size": 4},
}


def _counted(found: Counter[str]) -> None:
    """Count tensors that this rank receives, until the process ends."""
    real = dist.irecv

    def irecv(*args: Any, **kwargs: Any) -> Any:
        found["received"] += 1
        return real(*args, **kwargs)

    dist.irecv = dist.distributed_c10d.irecv = irecv


def _trained(path: Path, parallel: dict[str, Any], known: bool) -> dict[str, Any]:
    """Two updates; gradients of the first, weights, and the tensors that were received in the second."""
    if not known:
        Pipeline._messages = lambda self, micro_batches: {}  # type: ignore[method-assign]
    found: Counter[str] = Counter()
    with actor_of(path, parallel=parallel, trainer={"tokens_per_micro_batch": 128}) as actor:
        batch = batch_of(actor, make_rollouts(11))
        old = [values - 0.1 for values in actor.log_probs(batch)]
        batch = batch.with_token_values(old_log_probs=old)
        result: dict[str, Any] = {"old": torch.cat(old)}
        with actor.training():
            for step in range(2):
                with actor.training_step():
                    if step == 1:
                        _counted(found)
                    result[f"loss {step}"] = torch.tensor(actor.get_loss_and_metrics(batch, forward_only=False)[0])
                    if step == 1:
                        result["received"] = found["received"]
                    else:
                        result["gradients"] = gradients_of(actor)
        stage, last, chunks = actor.topology.pp.rank(), actor.topology.pp.size() - 1, len(actor.chunks)
        # Of each pass one tensor, but for the first of a direction.
        result["expected"] = len(batch.micro_batches) * (2 * chunks - (stage == 0) - (stage == last))
        result["weights"] = weights_of(actor)
        result["micro-batches"] = [m.input_ids.numel() for m in batch.micro_batches]
    return result


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_with_half_the_messages(layout: str, tmp_path: Path) -> None:
    """Log-probabilities, losses, gradients and weights; each tensor is received without its shape."""
    parallel, path = LAYOUTS[layout], make_qwen2(tmp_path, layers=4)
    sent, known = (run_ranks(_trained, parallel["world_size"], path, parallel, k) for k in (False, True))
    for a, b in zip(sent, known, strict=True):
        assert len(set(b["micro-batches"])) > 1
        assert torch.equal(a["old"], b["old"])
        assert all(torch.equal(a[f"loss {step}"], b[f"loss {step}"]) for step in range(2))
        for part in ("gradients", "weights"):
            assert a[part].keys() == b[part].keys()
            assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])
        assert b["received"] == b["expected"]
        assert a["received"] == 2 * b["received"]


def _communicator(monkeypatch: pytest.MonkeyPatch, rank: int, tokens: list[int]) -> KnownShapes:
    monkeypatch.setattr(P2PCommunicator, "__init__", lambda self, group, config: None)
    group: Any = SimpleNamespace(rank=lambda: rank, size=lambda: 2)
    config: Any = SimpleNamespace(hidden_size=8)
    return KnownShapes(group, config, tokens, 1)


def test_another_shape_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message must have the planned shape; more messages than planned are an error."""
    first = _communicator(monkeypatch, 0, [5, 3])
    assert first._communicate_shapes(torch.empty(5, 1, 8), None, False, True) == ([0, 0, 0], [5, 1, 8])
    with pytest.raises(RuntimeError, match=r"sends \[5, 1, 8\], but its receiver expects \[3, 1, 8\]"):
        first._communicate_shapes(torch.empty(5, 1, 8), None, False, False)
    last = _communicator(monkeypatch, 1, [5, 3])
    assert [last._communicate_shapes(None, None, True, False)[0] for _ in range(2)] == [[5, 1, 8], [3, 1, 8]]
    with pytest.raises(RuntimeError, match="more messages than the 2 of its micro-batches"):
        last._communicate_shapes(None, None, True, False)
    with pytest.raises(RuntimeError, match="more messages than the 0"):  # nothing comes back to the last stage
        last._communicate_shapes(None, None, False, True)


@pytest.mark.parametrize(("stages", "micro_batches", "chunks"), [(2, 4, 2), (2, 8, 3), (4, 8, 2)])
def test_both_ends_expect_the_same(
    stages: int, micro_batches: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both directions, what each stage sends is what the next one receives, message by message."""
    monkeypatch.setattr(P2PCommunicator, "__init__", lambda self, group, config: None)
    config: Any = SimpleNamespace(hidden_size=8, microbatch_group_size_per_vp_stage=stages)
    ranks = [
        KnownShapes(
            SimpleNamespace(rank=lambda r=rank: r, size=lambda: stages),  # type: ignore[arg-type]
            config,
            list(range(1, micro_batches + 1)),
            chunks,
        )
        for rank in range(stages)
    ]
    for direction, step in ((0, 1), (1, -1)):
        for rank, communicator in enumerate(ranks):
            receiver = ranks[(rank + step) % stages]
            assert communicator._sent[direction]._shapes == receiver._received[direction]._shapes
            assert len(communicator._sent[direction]._shapes) >= micro_batches * (chunks - 1)


def test_order_without_interleaving() -> None:
    """One after another."""
    config: Any = None
    assert known_shapes._order(3, 1, config) == [(0, 0), (1, 0), (2, 0)]
