"""torch's flash attention on the CPU, computed by its definition: what a GPU is asked for can then be run anywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

from megatron_fipo.model import attention

Tensor = torch.Tensor


def _sequences(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float | None) -> Iterator[tuple[Any, ...]]:
    """Yield of each sequence: its slice, queries, keys and values [n, H, D], and scaled scores [H, n, n]."""
    factor = scale or 1 / math.sqrt(q.shape[-1])
    for a, b in pairwise(int(end) for end in ends):
        keys, values = (x[a:b].float().repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("nhd,mhd->hnm", q[a:b].float(), keys) * factor
        yield slice(a, b), keys, values, scores.masked_fill(torch.ones(b - a, b - a).triu(1).bool(), -torch.inf)


def _forward(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Return the output [N, H, D] and the log-sum-exp [H, N]."""
    outputs, sums = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
    for at, _, values, scores in _sequences(q, k, v, ends, scale):
        outputs[at] = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), values).to(q.dtype)
        sums[:, at] = scores.logsumexp(-1)
    return outputs, sums


def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float | None) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v; autograd records nothing below its own dispatch."""
    factor = scale or 1 / math.sqrt(q.shape[-1])
    grads = [torch.empty_like(x) for x in (q, k, v)]
    for at, keys, values, scores in _sequences(q, k, v, ends, scale):
        p, out_grad = scores.softmax(-1), grad[at].float()
        p_grad = torch.einsum("nhd,mhd->hnm", out_grad, values)
        s_grad = p * (p_grad - (p * p_grad).sum(-1, keepdim=True)) * factor
        grads[0][at] = torch.einsum("hnm,mhd->nhd", s_grad, keys).to(q.dtype)
        of_keys = torch.einsum("hnm,nhd->mhd", s_grad, q[at].float())
        of_values = torch.einsum("hnm,nhd->mhd", p, out_grad)
        for whole, part in ((grads[1], of_keys), (grads[2], of_values)):  # summed over the queries of a group
            whole[at] = part.unflatten(1, (k.shape[1], -1)).sum(2).to(k.dtype)
    return tuple(grads)


@contextmanager
def flash_on_the_cpu() -> Iterator[list[tuple[int, int]]]:
    """Inside, packed attention takes flash attention on the CPU. Yields (sequences, longest) of each forward call."""
    calls: list[tuple[int, int]] = []

    def forward(
        q: Any, k: Any, v: Any, ends: Any, ends_k: Any, *rest: Any, scale: float | None = None, **_: Any
    ) -> Any:
        longest, longest_k, dropout, causal, debug_mask = rest
        assert (dropout, causal, debug_mask) == (0.0, True, False)
        assert ends.dtype == torch.int32
        assert torch.equal(ends, ends_k)
        assert longest == longest_k >= int(ends.diff().max())
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        calls.append((ends.numel() - 1, longest))
        nothing = torch.empty(0)
        return *_forward(q, k, v, ends, scale), torch.empty(2, dtype=torch.uint64), nothing, nothing

    def backward(grad: Any, q: Any, k: Any, v: Any, out: Any, sums: Any, ends: Any, *rest: Any, **kw: Any) -> Any:
        return _backward(grad, q, k, v, ends, kw.get("scale"))

    real = attention.flash_takes
    attention.flash_takes = lambda query: True
    try:
        with torch.library._scoped_library("aten", "IMPL") as library:
            library.impl("_flash_attention_forward", forward, "CPU")
            library.impl("_flash_attention_backward", backward, "CPU")
            yield calls
    finally:
        attention.flash_takes = real
