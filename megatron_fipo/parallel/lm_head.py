"""LM head, log-probability and entropy in one differentiable function that never materializes all logits.

For one row with hidden state h, head W, temperature T and target y, over the true vocabulary:

    z_j = (W h)_j / T        log_prob = z_y - logsumexp(z)        entropy = H = -sum_j p_j log p_j
    d log_prob / d z_j = [j = y] - p_j                            d H / d z_j = -p_j (log p_j + H)

Logits are computed for `chunk_tokens` rows at a time in one reused buffer, in forward and again in backward: four
matmuls instead of three, for memory that does not grow with the number of rows. All other work on a chunk's logits is
one pass in forward and one in backward, `megatron_fipo.ops.logits`.

Shapes: R rows (response tokens), H hidden size, V this rank's rows of the head, c rows of one chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fipo.ops.logits import RowTerms, empty_logits, logit_gradient, logit_statistics, statistics_dtype

# Rows of the head converted, or of its gradient held in low precision, at a time.
_VOCAB_BLOCK_ROWS = 16384


def token_log_probs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    temperature: float,
    group: dist.ProcessGroup | None,
    chunk_tokens: int,
    fp32_logits: bool,
) -> tuple[Tensor, Tensor]:
    """Return each target's log-probability and the distribution's entropy, in nats, vocabulary-parallel.

    Args:
        hidden: [R, H], the same rows on every rank of `group`. Cast to the head's dtype.
        weight: [V, H], rows [vocab_start, vocab_start + V) of the LM head.
        targets: [R] integer ids of the whole vocabulary. An id outside [0, vocab_size) has probability 0:
            its log-probability is -inf.
        vocab_start: first id of this rank's shard.
        vocab_size: ids from here on are padding: not multiplied, exactly excluded, with zero gradient.
        temperature: logits are divided by it, in float32.
        group: tensor-parallel group over which the vocabulary is split; None: not split.
        chunk_tokens: rows whose logits exist at a time, [chunk_tokens, V] in the matmul dtype.
        fp32_logits: compute logits in float32 for a head stored in a narrower dtype. Matmuls of the gradient stay in
            the head's dtype, as elsewhere in mixed-precision backward passes.

    Returns:
        log_probs [R], entropy [R], both float32 (float64 for a float64 head), equal on all ranks.

    Collectives:
        forward: over `group`, one all-reduce MAX of [R] and one all-reduce SUM of [3, R], whatever the number of
            chunks; none if the group has one rank or R = 0.
        backward: none. The gradient of `hidden` is PARTIAL: it sums over this rank's shard of the vocabulary
            only, and the CALLER must all-reduce (or, under sequence parallelism, reduce-scatter) it over `group`.
            The gradient of `weight` is complete for these rows.

    Only `hidden`, `weight`, `targets`, logsumexp and entropy are saved for backward. The gradient of `weight` is
    accumulated over chunks in float32: into Megatron-Core's float32 `main_grad` if `weight` has one, and autograd gets
    no gradient for `weight`; otherwise into a separate float32 [V, H]. Forward has the same bits with and without
    autograd recording. Other `chunk_tokens` may change the last bits, because a matmul's blocking depends on its shape.

    Raises:
        ValueError: for mismatched shapes, a temperature <= 0 or chunk_tokens < 1.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {list(hidden.shape)} and weight {list(weight.shape)} must be [R, H] and [V, H]")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {list(targets.shape)} must hold one id for each of {hidden.shape[0]} hidden rows")
    if temperature <= 0 or chunk_tokens < 1:
        raise ValueError(f"temperature {temperature} must be > 0 and chunk_tokens {chunk_tokens} at least 1")
    true_rows = min(max(vocab_size - vocab_start, 0), weight.shape[0])
    head = _Head(vocab_start, true_rows, temperature, chunk_tokens, fp32_logits)
    valid = (targets >= 0) & (targets < vocab_size)
    log_probs, entropy = _LMHead.apply(hidden.to(weight.dtype), weight, targets.long(), head, group)
    return log_probs.masked_fill(~valid, -torch.inf), entropy


def token_log_probs_and_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, temperature: float, fp32_logits: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute `token_log_probs_and_entropy` by definition: all logits, whole vocabulary, one process, autograd.

    hidden [R, H], weight [>= vocab_size, H] unsplit, targets [R] in [0, vocab_size) -> log_probs [R], entropy [R].
    """
    compute = statistics_dtype(weight.dtype)
    if fp32_logits:
        hidden, weight = hidden.to(compute), weight.to(compute)
    logits = (hidden.to(weight.dtype) @ weight[:vocab_size].T).to(compute) / temperature  # [R, vocab_size]
    log_p = torch.log_softmax(logits, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), entropy


class _Head(NamedTuple):
    """How to read a shard of the head; see `token_log_probs_and_entropy` for the fields."""

    vocab_start: int
    true_rows: int  # rows of the shard without padding: the first ones
    temperature: float
    chunk_tokens: int
    fp32_logits: bool


class _LMHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, head: _Head, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        statistics = _shard_statistics(hidden, weight, targets, head)
        if hidden.shape[0] > 0 and group is not None and dist.get_world_size(group) > 1:
            _reduce_statistics(statistics, group)
        maximum, sum_exp, sum_exp_shifted, target_logit = statistics
        log_sum = sum_exp.log()
        log_probs = target_logit - maximum - log_sum
        entropy = log_sum - sum_exp_shifted / sum_exp
        ctx.save_for_backward(hidden, weight, targets, maximum + log_sum, entropy)
        ctx.head = head
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_log_probs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, logsumexp, entropy = ctx.saved_tensors
        if grad_log_probs is None and grad_entropy is None:
            return None, None, None, None, None
        terms = _row_terms(grad_log_probs, grad_entropy, logsumexp, entropy, ctx.head.temperature)
        grads = _shard_gradients(hidden, weight, targets, terms, ctx.head, ctx.needs_input_grad)
        return *grads, None, None, None


def _shard_statistics(hidden: Tensor, weight: Tensor, targets: Tensor, head: _Head) -> Tensor:
    """Return `logit_statistics` of all rows over this rank's shard, [4, R].

    A shard that is all padding returns the lowest finite maximum and zeros, which the reduction ignores. (-inf
    would turn into NaN there.)
    """
    compute = statistics_dtype(weight.dtype)
    statistics = hidden.new_zeros((4, hidden.shape[0]), dtype=compute)
    if head.true_rows == 0:
        statistics[0] = torch.finfo(compute).min
        return statistics
    logits = _ChunkLogits(hidden, weight, head)
    columns = targets - head.vocab_start
    for rows in _slices(0, hidden.shape[0], head.chunk_tokens):
        logit_statistics(logits.multiply(rows), columns[rows], head.temperature, statistics[:, rows])
    return statistics


def _reduce_statistics(statistics: Tensor, group: dist.ProcessGroup) -> None:
    """Reduce the statistics of shards, [4, R], to those of the whole vocabulary, in place.

    Collectives: all-reduce MAX [R], then all-reduce SUM [3, R], over `group`. Each shard's sums are first rescaled
    to the common maximum, so that one of each suffices for all chunks.
    """
    maximum, sums = statistics[0], statistics[1:]
    of_shard = maximum.clone()
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    shift = of_shard - maximum
    scale = shift.exp()
    sums[1].add_(shift * sums[0]).mul_(scale)
    sums[0].mul_(scale)
    dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=group)


def _row_terms(
    grad_log_probs: Tensor | None, grad_entropy: Tensor | None, lse: Tensor, entropy: Tensor, temperature: float
) -> RowTerms:
    """Return the terms of d loss / d (undivided logits), including the chain rule's 1 / temperature. [R] each."""
    log_prob = torch.zeros_like(lse) if grad_log_probs is None else grad_log_probs / temperature
    if grad_entropy is None:
        return RowTerms(lse, log_prob, None, log_prob)
    slope = grad_entropy / temperature
    return RowTerms(lse, log_prob, slope, log_prob + slope * entropy)


def _shard_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, terms: RowTerms, head: _Head, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of `hidden` [R, H] (this shard's part) and `weight` [V, H], recomputing logits per chunk."""
    grad_hidden = torch.zeros_like(hidden) if needed[0] else None
    grad_weight = _WeightGradient(weight, head.true_rows) if needed[1] else None
    if head.true_rows > 0:
        columns = targets - head.vocab_start
        logits = _ChunkLogits(hidden, weight, head)
        for rows in _slices(0, hidden.shape[0], head.chunk_tokens):
            gradient = logits.gradient_buffer(rows)
            logit_gradient(logits.multiply(rows), columns[rows], terms.at(rows), head.temperature, gradient)
            if grad_hidden is not None:
                torch.mm(gradient, weight[: head.true_rows], out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.add(gradient, hidden[rows])
    return grad_hidden, None if grad_weight is None else grad_weight.for_autograd()


class _WeightGradient:
    """Float32 sum of the gradient of the head's rows, in Megatron-Core's `main_grad` if there is one.

    Data parallelism then has nothing to add, so autograd gets no gradient and no [V, H] is allocated. For tied
    embeddings it adds the embedding's part, since Megatron-Core marks such weights `zero_out_wgrad`.
    """

    def __init__(self, weight: Tensor, true_rows: int) -> None:
        self.weight = weight
        compute = statistics_dtype(weight.dtype)
        main: Tensor | None = getattr(weight, "main_grad", None)
        self.in_main = main is not None and main.dtype == compute
        self.sum = main if main is not None and self.in_main else torch.zeros_like(weight, dtype=compute)
        self.true_rows = true_rows

    def add(self, grad_logits: Tensor, hidden: Tensor) -> None:
        """Add grad_logits^T [V, c] @ hidden [c, H]."""
        target = self.sum[: self.true_rows]
        if target.dtype == hidden.dtype:
            target.addmm_(grad_logits.T, hidden)
        elif target.is_cuda and _adds_products_in_float32(target.device, hidden.dtype):
            torch.addmm(target, grad_logits.T, hidden, out_dtype=target.dtype, out=target)
        else:
            for vocab in _slices(0, target.shape[0], _VOCAB_BLOCK_ROWS):
                target[vocab].add_(grad_logits[:, vocab].T @ hidden)

    def for_autograd(self) -> Tensor | None:
        """Return the gradient for autograd; None if it is already in Megatron-Core's buffer."""
        if not self.in_main:
            return self.sum.to(self.weight.dtype)
        self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return None


@functools.cache
def _adds_products_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether this torch can accumulate a matmul of narrow matrices into float32 in place; 2.11 may not."""
    total = torch.ones(16, 16, device=device)
    narrow = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, narrow, narrow, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


class _ChunkLogits:
    """Logits of one chunk of rows at a time, in preallocated buffers.

    Memory: one [c, true_rows] buffer in the matmul dtype; `fp32_logits` with a narrower head adds one in the head's
    dtype in backward.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, head: _Head) -> None:
        self.hidden, self.weight = hidden, weight[: head.true_rows]
        dtype = statistics_dtype(weight.dtype) if head.fp32_logits else weight.dtype
        self.logits = self._empty(min(head.chunk_tokens, hidden.shape[0]), dtype)
        self.grad_logits: Tensor | None = None

    def _empty(self, rows: int, dtype: torch.dtype) -> Tensor:
        return empty_logits(rows, self.weight.shape[0], dtype, self.hidden.device)

    def multiply(self, chunk: slice) -> Tensor:
        """Return hidden[chunk] @ weight^T, [c, true_rows], in the buffer."""
        hidden, out = self.hidden[chunk], self.logits[: chunk.stop - chunk.start]
        if out.dtype == hidden.dtype:
            torch.mm(hidden, self.weight.T, out=out)
        elif out.is_cuda:
            # exact products of narrow inputs, summed and kept in float32, without a converted copy of the head
            torch.mm(hidden, self.weight.T, out_dtype=out.dtype, out=out)
        else:
            wide = hidden.to(out.dtype)
            for vocab in _slices(0, self.weight.shape[0], _VOCAB_BLOCK_ROWS):
                out[:, vocab] = wide @ self.weight[vocab].to(out.dtype).T
        return out

    def gradient_buffer(self, chunk: slice) -> Tensor:
        """Return a [c, true_rows] buffer for a gradient in the head's dtype: the logits' memory if it fits."""
        if self.grad_logits is None:
            same = self.logits.dtype == self.weight.dtype
            self.grad_logits = self.logits if same else self._empty(self.logits.shape[0], self.weight.dtype)
        return self.grad_logits[: chunk.stop - chunk.start]


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))
