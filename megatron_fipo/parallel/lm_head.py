"""LM head, log-probability and entropy in one differentiable function that never holds whole logits.

For one row with hidden state h, head W, temperature T and target y, over the true vocabulary:

    z_j = (W h)_j / T        log_prob = z_y - logsumexp(z)        entropy = H = -sum_j p_j log p_j
    d log_prob / d z_j = [j = y] - p_j                            d H / d z_j = -p_j (log p_j + H)

Logits are multiplied `chunk_tokens` rows at a time into one reused buffer, once in forward and again in
backward: four matrix products instead of three buy memory that does not grow with the number of rows.
Within a chunk the element-wise passes run over a few rows at a time, so that they stay in a CPU's cache and
float32 copies of low-precision logits stay small.

Shapes: R rows (response tokens), H hidden size, V this rank's rows of the head, c rows of one chunk,
b rows of one element-wise block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of one element-wise block: about a CPU core's L2 cache; on a GPU enough to fill the device.
_BLOCK_BYTES_CPU = 4 << 20
_BLOCK_BYTES_CUDA = 64 << 20
# Rows of the head converted, or of its gradient held in low precision, at once.
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
    """Log-probability of each target and entropy of the whole distribution, in nats, vocabulary-parallel.

    Args:
        hidden: [R, H], the same rows on every rank of `group`. Cast to the head's dtype.
        weight: [V, H], rows [vocab_start, vocab_start + V) of the LM head.
        targets: [R] integer ids of the whole vocabulary. An id outside [0, vocab_size) has probability 0:
            its log-probability is -inf.
        vocab_start: first id of this rank's shard.
        vocab_size: ids from here on pad the vocabulary. They are never multiplied: excluded exactly, zero gradient.
        temperature: logits are divided by it, in float32.
        group: the tensor-parallel group over which the vocabulary is split; None: not split.
        chunk_tokens: rows whose logits exist at the same time, [chunk_tokens, V] in the dtype of the product.
        fp32_logits: multiply in float32 a head that is stored in a narrower dtype. The gradient's products
            stay in the head's dtype, as everywhere else in a mixed-precision backward pass.

    Returns:
        log_probs [R], entropy [R], both float32 (float64 for a float64 head), the same on every rank.

    Collectives:
        forward: over `group`, one all-reduce MAX of [R] and one all-reduce SUM of [3, R], whatever the number of
            chunks; none if the group has one rank or R = 0.
        backward: none. The gradient of `hidden` is PARTIAL: it sums over this rank's shard of the vocabulary
            only, and the CALLER must all-reduce (or, under sequence parallelism, reduce-scatter) it over `group`.
            The gradient of `weight` is complete for these rows.

    Only `hidden`, `weight`, `targets`, logsumexp and entropy are saved for backward. The gradient of `weight`
    is accumulated over chunks in float32 (one float32 [V, H] while backward runs, if the head is narrower).
    Forward gives the same bits with and without autograd recording. Other `chunk_tokens` may give other last
    bits, because a matrix product's blocking depends on its shape.

    Raises:
        ValueError: for shapes that do not fit, a temperature <= 0 or chunk_tokens < 1.
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
    """What `token_log_probs_and_entropy` means: whole logits, whole vocabulary, one process, autograd.

    hidden [R, H], weight [>= vocab_size, H] unsplit, targets [R] in [0, vocab_size) -> log_probs [R], entropy [R].
    """
    compute = _compute_dtype(weight.dtype)
    if fp32_logits:
        hidden, weight = hidden.to(compute), weight.to(compute)
    logits = (hidden.to(weight.dtype) @ weight[:vocab_size].T).to(compute) / temperature  # [R, vocab_size]
    log_p = torch.log_softmax(logits, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), entropy


class _Head(NamedTuple):
    """How to read a shard of the head; see `token_log_probs_and_entropy` for the fields of the same name."""

    vocab_start: int
    true_rows: int  # rows of the shard that are no padding: the first ones
    temperature: float
    chunk_tokens: int
    fp32_logits: bool


class _LMHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, head: _Head, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        maximum, sums = _shard_statistics(hidden, weight, targets, head)
        if hidden.shape[0] > 0 and group is not None and dist.get_world_size(group) > 1:
            maximum, sums = _reduce_statistics(maximum, sums, group)
        sum_exp, sum_exp_shifted, target_logit = sums
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
        rows = _RowGradients.of(grad_log_probs, grad_entropy, logsumexp, entropy, ctx.head.temperature)
        grads = _shard_gradients(hidden, weight, targets, rows, ctx.head, ctx.needs_input_grad)
        return *grads, None, None, None


def _shard_statistics(hidden: Tensor, weight: Tensor, targets: Tensor, head: _Head) -> tuple[Tensor, Tensor]:
    """Of this rank's shard: max z [R], and [3, R] = sum exp(z - max), sum exp(z - max) (z - max), z of the target.

    A shard that is wholly padding gives the lowest finite maximum and zeros, which the reduction ignores. (-inf
    would turn into NaN there.)
    """
    compute = _compute_dtype(weight.dtype)
    maximum = hidden.new_full((hidden.shape[0],), torch.finfo(compute).min, dtype=compute)  # [R]
    sums = hidden.new_zeros((3, hidden.shape[0]), dtype=compute)  # [3, R]
    if head.true_rows == 0:
        return maximum, sums
    columns, owned = _local_columns(targets, head)
    logits = _ChunkLogits(hidden, weight, head)
    for rows in _slices(0, hidden.shape[0], head.chunk_tokens):
        logits.multiply(rows)
        for at, z, scratch in logits.blocks(rows):
            target = z.gather(1, columns[at, None]).squeeze(1)
            sums[2, at] = torch.where(owned[at], target, 0.0)
            torch.amax(z, dim=1, out=maximum[at])
            z.sub_(maximum[at, None])
            torch.exp(z, out=scratch)
            torch.sum(scratch, dim=1, out=sums[0, at])
            torch.sum(scratch.mul_(z), dim=1, out=sums[1, at])
    return maximum, sums


def _reduce_statistics(maximum: Tensor, sums: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Statistics of the whole vocabulary from those of each shard, [R] and [3, R].

    Collectives: all-reduce MAX [R], then all-reduce SUM [3, R], over `group`. Each shard's sums are first moved
    to the common maximum, which is why one of each serves all chunks.
    """
    overall = maximum.clone()
    dist.all_reduce(overall, op=dist.ReduceOp.MAX, group=group)
    shift = maximum - overall
    scale = shift.exp()
    sums[1].add_(shift * sums[0]).mul_(scale)
    sums[0].mul_(scale)
    dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=group)
    return overall, sums


class _RowGradients(NamedTuple):
    """What backward needs of each row, [R] each: d loss / d z_j = log_prob [j = y] - p_j (slope log p_j + offset)."""

    log_prob: Tensor
    slope: Tensor | None  # None: the entropy has no gradient and slope is 0
    offset: Tensor
    logsumexp: Tensor

    @classmethod
    def of(
        cls,
        grad_log_probs: Tensor | None,
        grad_entropy: Tensor | None,
        lse: Tensor,
        entropy: Tensor,
        temperature: float,
    ) -> _RowGradients:
        log_prob = torch.zeros_like(lse) if grad_log_probs is None else grad_log_probs / temperature
        if grad_entropy is None:
            return cls(log_prob, None, log_prob, lse)
        slope = grad_entropy / temperature
        return cls(log_prob, slope, log_prob + slope * entropy, lse)


def _shard_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: _RowGradients, head: _Head, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `hidden` [R, H] (this shard's part) and `weight` [V, H], recomputing logits chunk by chunk."""
    grad_hidden = torch.zeros_like(hidden) if needed[0] else None
    grad_weight = torch.zeros_like(weight, dtype=_compute_dtype(weight.dtype)) if needed[1] else None
    if head.true_rows > 0:
        columns, owned = _local_columns(targets, head)
        logits = _ChunkLogits(hidden, weight, head)
        for chunk in _slices(0, hidden.shape[0], head.chunk_tokens):
            logits.multiply(chunk)
            grad_logits = logits.gradient_buffer(chunk)  # [c, true_rows]
            for at, z, scratch in logits.blocks(chunk):
                _block_gradient_(z, scratch, at, rows, columns, owned)
                logits.store_gradient(at, chunk, z)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight[: head.true_rows], out=grad_hidden[chunk])
            if grad_weight is not None:
                _add_weight_gradient_(grad_weight[: head.true_rows], grad_logits, hidden[chunk])
    return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)


def _block_gradient_(
    z: Tensor, scratch: Tensor, at: slice, rows: _RowGradients, columns: Tensor, owned: Tensor
) -> None:
    """Turns logits z [b, true_rows] of rows `at` into the gradient of the undivided logits, in place."""
    z.sub_(rows.logsumexp[at, None])  # log p
    if rows.slope is None:
        z.exp_().mul_(-rows.offset[at, None])
    else:
        torch.exp(z, out=scratch)
        z.mul_(-rows.slope[at, None]).sub_(rows.offset[at, None]).mul_(scratch)
    column = columns[at, None]
    # gather and scatter, since scatter_add_ has no deterministic form on CUDA
    at_target = z.gather(1, column) + torch.where(owned[at], rows.log_prob[at], 0.0)[:, None]
    z.scatter_(1, column, at_target)


def _add_weight_gradient_(grad_weight: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
    """grad_weight [true_rows, H] += grad_logits^T [true_rows, c] @ hidden [c, H], summed in grad_weight's dtype."""
    if grad_weight.dtype == hidden.dtype:
        grad_weight.addmm_(grad_logits.T, hidden)
        return
    for vocab in _slices(0, grad_weight.shape[0], _VOCAB_BLOCK_ROWS):
        grad_weight[vocab].add_(grad_logits[:, vocab].T @ hidden)


class _ChunkLogits:
    """Logits of one chunk of rows at a time, in buffers allocated once.

    Alive: one [c, true_rows] buffer in the dtype of the product, and two float32 scratch blocks of a few rows
    (one if the product is float32 already: its blocks are then worked on in place). `fp32_logits` with a narrower
    head adds a [c, true_rows] buffer of the head's dtype in backward.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, head: _Head) -> None:
        self.hidden, self.weight, self.temperature = hidden, weight[: head.true_rows], head.temperature
        compute = _compute_dtype(weight.dtype)
        self.in_place = head.fp32_logits or weight.dtype == compute
        chunk = min(head.chunk_tokens, hidden.shape[0])
        self.logits = hidden.new_empty((chunk, head.true_rows), dtype=compute if self.in_place else weight.dtype)
        self.grad_logits: Tensor | None = None
        limit = _BLOCK_BYTES_CUDA if hidden.is_cuda else _BLOCK_BYTES_CPU
        self.block_rows = max(1, min(chunk, limit // (head.true_rows * compute.itemsize)))
        self.scratch = hidden.new_empty((1 if self.in_place else 2, self.block_rows, head.true_rows), dtype=compute)

    def multiply(self, chunk: slice) -> None:
        """Fills the buffer with hidden[chunk] @ weight^T."""
        hidden, out = self.hidden[chunk], self.logits[: chunk.stop - chunk.start]
        if out.dtype == hidden.dtype:
            torch.mm(hidden, self.weight.T, out=out)
        elif out.is_cuda:
            # exact products of the narrow inputs, summed and kept in float32: no converted copy of the head
            torch.mm(hidden, self.weight.T, out_dtype=out.dtype, out=out)
        else:
            wide = hidden.to(out.dtype)
            for vocab in _slices(0, self.weight.shape[0], _VOCAB_BLOCK_ROWS):
                out[:, vocab] = wide @ self.weight[vocab].to(out.dtype).T

    def blocks(self, chunk: slice) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields (rows of R, float32 logits / temperature [b, true_rows] to overwrite, scratch of that shape)."""
        for at in _slices(chunk.start, chunk.stop, self.block_rows):
            scratch = self.scratch[:, : at.stop - at.start]
            z = self.logits[at.start - chunk.start : at.stop - chunk.start]
            if not self.in_place:
                z = scratch[1].copy_(z)
            if self.temperature != 1.0:
                z.div_(self.temperature)
            yield at, z, scratch[0]

    def gradient_buffer(self, chunk: slice) -> Tensor:
        """[c, true_rows] in the head's dtype, to be filled by `store_gradient`: the logits' own memory if it fits."""
        if self.grad_logits is None:
            same = self.logits.dtype == self.weight.dtype
            self.grad_logits = self.logits if same else torch.empty_like(self.logits, dtype=self.weight.dtype)
        return self.grad_logits[: chunk.stop - chunk.start]

    def store_gradient(self, at: slice, chunk: slice, z: Tensor) -> None:
        """Keeps block z [b, true_rows] of rows `at` as part of the chunk's gradient buffer."""
        if z.dtype != self.weight.dtype:
            self.gradient_buffer(chunk)[at.start - chunk.start : at.stop - chunk.start] = z


def _local_columns(targets: Tensor, head: _Head) -> tuple[Tensor, Tensor]:
    """Column of each target in this shard [R] (0 where another shard owns it), and whether this one does [R] bool."""
    columns = targets - head.vocab_start
    owned = (columns >= 0) & (columns < head.true_rows)
    return columns.where(owned, 0), owned


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _slices(start: int, stop: int, step: int) -> Iterator[slice]:
    return (slice(at, min(at + step, stop)) for at in range(start, stop, step))
