"""Registration of the compiled kernels with torch: schema, kernels, fake kernels, and derivative of the loss."""

from typing import Any

import torch
from torch import Tensor

from megatron_fipo.ops import extension

NUM_TENSOR_ARGUMENTS = 10  # of fipo_loss, including optional ones

_library = torch.library.Library("megatron_fipo", "DEF")  # the ops exist as long as it does


def register() -> None:
    """Register the ops."""
    for schema, kernel in (
        (extension.SCAN, extension.future_kl_scan),
        (extension.SUMMARY, extension.chunk_summary),
        (extension.LOSS, extension.fipo_loss),
    ):
        name = schema.partition("(")[0]
        _library.define(schema)
        for device in ("CPU", "CUDA"):
            _library.impl(name, kernel, device)
    torch.library.register_fake("megatron_fipo::future_kl_scan", _fake_scan, lib=_library)
    torch.library.register_fake("megatron_fipo::chunk_summary", _fake_summary, lib=_library)
    torch.library.register_fake("megatron_fipo::fipo_loss", _fake_loss, lib=_library)
    torch.library.register_autograd("megatron_fipo::fipo_loss", _backward, setup_context=_keep_gradient, lib=_library)


def _segments(cu_seqlens: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty(cu_seqlens.shape[0] - 1, dtype=dtype)


def _fake_scan(log_probs: Tensor, old_log_probs: Tensor | None, mask: Tensor, cu_seqlens: Tensor, *_: Any) -> Any:
    return log_probs.new_empty(log_probs.shape, dtype=torch.float32), _segments(cu_seqlens, log_probs, torch.float32)


def _fake_summary(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, mask: Tensor, cu_seqlens: Tensor, *_: Any
) -> Any:
    return tuple(_segments(cu_seqlens, log_probs, dtype) for dtype in (torch.float32, torch.int64, torch.int64))


def _fake_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    *_: Any,
    with_weights: bool = False,
    **constants: Any,
) -> Any:
    shape = log_probs.shape if with_weights else (0,)
    return (
        log_probs.new_empty((), dtype=torch.float32),
        log_probs.new_empty(log_probs.shape, dtype=torch.float32),
        log_probs.new_empty(extension.num_metrics(), dtype=torch.float64),
        log_probs.new_empty((2, extension.histogram_bins()), dtype=torch.int64),
        _segments(cu_seqlens, log_probs, torch.bool),
        log_probs.new_empty(shape, dtype=torch.float32),
        log_probs.new_empty(shape, dtype=torch.float32),
    )


def _keep_gradient(ctx: Any, inputs: Any, keyword_only_inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.dtype = inputs[0].dtype


def _backward(ctx: Any, grad_loss_sum: Tensor | None, *_: Any) -> Any:
    if grad_loss_sum is None:
        return (None,) * NUM_TENSOR_ARGUMENTS
    (gradient,) = ctx.saved_tensors
    return (gradient * grad_loss_sum).to(ctx.dtype), *(None,) * (NUM_TENSOR_ARGUMENTS - 1)
