"""Statistics and gradient of one chunk of logits, one pass each: compiled where built, otherwise in plain torch.

csrc/lm_head.h defines the kernels' interface; `_statistics` and `_gradient` below define the same in torch. Letters in
shapes: c rows (tokens) of a chunk, V columns (this rank's true rows of the LM head).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megatron_fipo.ops import extension

Backend = Literal["auto", "reference"]

_NARROW = (torch.float32, torch.bfloat16)
_ALIGNED_ELEMENTS = 64  # rows of logits begin at multiples of it, for vector loads and fast matmuls
# Bytes of an element-wise block in torch: about a CPU core's L2 cache; on a GPU enough to fill the device.
_BLOCK_BYTES_CPU = 4 << 20
_BLOCK_BYTES_CUDA = 64 << 20


class RowTerms(NamedTuple):
    """Terms of each row's gradient, [c] each, in the dtype of the statistics.

    d loss / d z_j = log_prob [j = target] - p_j (slope log p_j + offset), for z = logits / temperature.
    """

    logsumexp: Tensor
    log_prob: Tensor
    slope: Tensor | None  # None: 0
    offset: Tensor

    def at(self, rows: slice) -> RowTerms:
        """Return the terms of a slice of the rows."""
        return RowTerms(*(None if term is None else term[rows] for term in self))  # type: ignore[arg-type]


def empty_logits(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return uninitialized [rows, columns] with aligned rows, as the kernels require.

    Padding between rows is 0: oneDNN's bfloat16 matmuls read it and multiply it by zero.
    """
    stride = -(-columns // _ALIGNED_ELEMENTS) * _ALIGNED_ELEMENTS
    memory = torch.empty(rows, stride, dtype=dtype, device=device)
    memory[:, columns:].zero_()
    return memory[:, :columns]


def logit_statistics(
    logits: Tensor, targets: Tensor, temperature: float, out: Tensor, *, backend: Backend = "auto"
) -> None:
    """Write maximum, sum exp(z - max), sum exp(z - max) (z - max) and target z of each row, z = logits / temperature.

    Args:
        logits: [c, V] from `empty_logits`; overwritten only by the torch implementation.
        targets: [c] int64 columns; those outside [0, V) belong to other shards, and their z is written as 0.
        temperature: > 0.
        out: [4, c], float32 (float64 for float64 logits), each row contiguous.
        backend: "reference" is plain torch, "auto" the compiled kernels if possible.

    Raises:
        ValueError: shape, dtype, device or alignment do not match the above.
    """
    _check_logits(logits, targets)
    _check("out", out, (4, logits.shape[0]), statistics_dtype(logits.dtype), logits.device)
    if backend == "auto" and serves(logits):
        statistics = _compiled().LogitStatistics(
            **{name: row.data_ptr() for name, row in zip(_STATISTICS, out, strict=True)}
        )
        _run("logit_statistics", logits, targets, temperature, statistics)
    else:
        _statistics(logits, targets, temperature, out)


def logit_gradient(
    logits: Tensor, targets: Tensor, terms: RowTerms, temperature: float, out: Tensor, *, backend: Backend = "auto"
) -> None:
    """Write the gradient with respect to z = logits / temperature, in one pass; `RowTerms` has the formula.

    Args:
        logits, targets, temperature, backend: as for `logit_statistics`.
        terms: terms of each row.
        out: [c, V] from `empty_logits`, in the dtype of the logits or bfloat16; may be the memory of the logits.

    Raises:
        ValueError: shape, dtype, device or alignment do not match the above.
    """
    _check_logits(logits, targets)
    given = {name: term for name, term in terms._asdict().items() if term is not None}
    for name, term in given.items():
        _check(name, term, targets.shape, statistics_dtype(logits.dtype), logits.device)
    _check("out", out, logits.shape, torch.bfloat16 if out.dtype == torch.bfloat16 else logits.dtype, logits.device)
    if backend == "auto" and serves(logits):
        _check_rows("out", out)
        gradient = _compiled().LogitGradient(
            values=out.data_ptr(),
            stride=out.stride(0),
            bfloat16=out.dtype == torch.bfloat16,
            **{name: given[name].data_ptr() if name in given else 0 for name in RowTerms._fields},
        )
        _run("logit_gradient", logits, targets, temperature, gradient)
    else:
        _gradient(logits, targets, terms, temperature, out)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over logits: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def serves(logits: Tensor) -> bool:
    """Return whether compiled kernels support this dtype on this device."""
    if logits.device.type == "cuda":
        return extension.has_cuda() and logits.dtype in _NARROW
    return extension.is_built() and logits.device.type == "cpu" and logits.dtype in _NARROW


# ---- compiled ----

_STATISTICS = ("maximum", "sum_exp", "sum_exp_shifted", "target")


def _compiled() -> Any:
    return extension.module()


def _run(name: str, logits: Tensor, targets: Tensor, temperature: float, out: Any) -> None:
    """Call a kernel; on a GPU it is only enqueued on the current stream."""
    _check_rows("logits", logits)
    struct = _compiled().Logits(
        values=logits.data_ptr(),
        targets=targets.data_ptr(),
        rows=logits.shape[0],
        columns=logits.shape[1],
        stride=logits.stride(0),
        inverse_temperature=1 / temperature,
        bfloat16=logits.dtype == torch.bfloat16,
    )
    if logits.device.type == "cpu":
        getattr(_compiled(), f"{name}_cpu")(struct, out, torch.get_num_threads())
        return
    with torch.cuda.device(logits.device):
        stream = torch.cuda.current_stream(logits.device).cuda_stream
        getattr(_compiled(), f"{name}_cuda")(struct, out, stream)


def _check_logits(logits: Tensor, targets: Tensor) -> None:
    if logits.dim() != 2 or logits.numel() == 0:
        raise ValueError(f"logits {list(logits.shape)} must be [c, V] and not empty")
    _check("targets", targets, logits.shape[:1], torch.int64, logits.device)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device or tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must be {list(shape)} {dtype} on {device} with contiguous rows, "
            f"not {list(tensor.shape)} {tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
        )


def _check_rows(name: str, tensor: Tensor) -> None:
    alignment = _compiled().LOGIT_ALIGNMENT
    step = tensor.stride(0) * tensor.element_size()
    if tensor.stride(1) != 1 or tensor.data_ptr() % alignment or step % alignment:
        raise ValueError(f"rows of {name} must begin at multiples of {alignment} bytes; allocate with empty_logits")


# ---- definition in torch: element-wise passes over blocks of rows ----


def _statistics(logits: Tensor, targets: Tensor, temperature: float, out: Tensor) -> None:
    maximum, sum_exp, sum_exp_shifted, target = out
    columns, is_here = _local(targets, logits.shape[1])
    for rows, z, scratch in _blocks(logits, temperature):
        target[rows] = torch.where(is_here[rows], z.gather(1, columns[rows, None]).squeeze(1), 0.0)
        torch.amax(z, dim=1, out=maximum[rows])
        z.sub_(maximum[rows, None])
        torch.exp(z, out=scratch)
        torch.sum(scratch, dim=1, out=sum_exp[rows])
        torch.sum(scratch.mul_(z.clamp_(min=torch.finfo(z.dtype).min)), dim=1, out=sum_exp_shifted[rows])


def _gradient(logits: Tensor, targets: Tensor, terms: RowTerms, temperature: float, out: Tensor) -> None:
    columns, is_here = _local(targets, logits.shape[1])
    for rows, z, scratch in _blocks(logits, temperature):
        z.sub_(terms.logsumexp[rows, None])  # log p
        if terms.slope is None:
            z.exp_().mul_(-terms.offset[rows, None])
        else:
            torch.exp(z, out=scratch)
            z.clamp_(min=torch.finfo(z.dtype).min)  # avoids NaN from 0 times -inf
            z.mul_(-terms.slope[rows, None]).sub_(terms.offset[rows, None]).mul_(scratch)
        column = columns[rows, None]
        # gather and scatter, since scatter_add_ has no deterministic form on CUDA
        at_target = z.gather(1, column) + torch.where(is_here[rows], terms.log_prob[rows], 0.0)[:, None]
        z.scatter_(1, column, at_target)
        if z.data_ptr() != out[rows].data_ptr() or z.dtype != out.dtype:
            out[rows] = z


def _local(targets: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return the column of each target (0 if in another shard) and whether it is in this shard, [c] each."""
    is_here = (targets >= 0) & (targets < columns)
    return targets.where(is_here, 0), is_here


def _blocks(logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (rows, z [b, V] to overwrite, scratch of that shape), both at least float32.

    Float32 logits are overwritten in place; narrower ones are converted block by block, to limit copies.
    """
    compute = statistics_dtype(logits.dtype)
    limit = _BLOCK_BYTES_CUDA if logits.is_cuda else _BLOCK_BYTES_CPU
    count = max(1, min(logits.shape[0], limit // (logits.shape[1] * compute.itemsize)))
    in_place = logits.dtype == compute
    scratch = logits.new_empty((1 if in_place else 2, count, logits.shape[1]), dtype=compute)
    for start in range(0, logits.shape[0], count):
        rows = slice(start, min(start + count, logits.shape[0]))
        block = scratch[:, : rows.stop - rows.start]
        z = logits[rows] if in_place else block[1].copy_(logits[rows])
        if temperature != 1.0:
            z.div_(temperature)
        yield rows, z, block[0]
