"""The table of launches and bytes: what the counter sees of known operations, and the sizes it is scaled to."""

from __future__ import annotations

import argparse

import torch

from benchmarks import head_traffic


def test_known_operations() -> None:
    """An in-place operation reads and writes its tensor, a copy writes only its target, a view moves nothing."""
    x, y, out = torch.zeros(100), torch.zeros(100), torch.zeros(100)
    counted = {
        "sub_": (lambda: x.sub_(y), 1, 1200),
        "exp": (lambda: torch.exp(x, out=out), 1, 800),
        "copy_": (lambda: x.copy_(y), 1, 800),
        "sum": (lambda: x.view(10, 10)[:5].sum(), 1, 204),
        "view": (lambda: x.view(4, 25)[1:], 0, 0),
    }
    for name, (call, launches, moved) in counted.items():
        traffic = head_traffic.count(call)
        assert (traffic.launches, traffic.bytes) == (launches, moved), name


def test_table() -> None:
    """Compiled, a bfloat16 logit is read once forward, and read and written once backward, one launch a chunk each."""
    args = argparse.Namespace(tokens=1000, vocab=5000, hidden=64, chunk_tokens=300)
    (_, torch_forward, forward), (_, torch_backward, backward), weight, loss = head_traffic.rows_of_table(args)
    assert (forward.launches, forward.bytes) == (4, 2 * 1000 * 5000)
    assert (backward.launches, backward.bytes) == (4, 4 * 1000 * 5000)
    assert torch_forward.bytes > 20 * forward.bytes
    assert torch_backward.bytes > 10 * backward.bytes
    assert weight[2].bytes == 4 * 8 * 5000 * 64
    assert loss[2].launches == 1
