"""Compiled kernels as torch ops; the only file that imports and calls the extension.

csrc/fipo.h defines the interface. The ops, with `log_probs` etc. as in `megatron_fipo.algorithm.fipo_loss`:

    megatron_fipo::future_kl_scan   [N] Future-KL and [S] carry-out, with carry-in
    megatron_fipo::chunk_summary    [S] what other chunks of a sharded sequence need from this one
    megatron_fipo::fipo_loss        loss, gradient and metrics; differentiable in log_probs

Letters in shapes: N packed tokens, S segments (sequences, or chunks of sharded ones).
"""

import importlib
import importlib.util
import math
import os
from typing import Any

import torch  # before the extension, so that both use torch's OpenMP threads
from torch import Tensor

from megatron_fipo.config.loss import AGGREGATIONS, CLIP_BOUND_TOLERANCE
from megatron_fipo.ops.packing import check_offsets

MAX_TOKENS = 2**31 - 1  # also for segments: the kernels use 32-bit counts

SCAN = """future_kl_scan(
    Tensor log_probs, Tensor? old_log_probs, Tensor mask, Tensor cu_seqlens, float half_life,
    float log_ratio_clamp, float log_dual_clip, Tensor? carry_in=None
) -> (Tensor future_kl, Tensor carry_out)"""
SUMMARY = """chunk_summary(
    Tensor log_probs, Tensor old_log_probs, Tensor advantages, Tensor mask, Tensor cu_seqlens, float half_life,
    float log_ratio_clamp, float log_dual_clip
) -> (Tensor carry_out, Tensor dual_clipped, Tensor loss_tokens)"""
LOSS = """fipo_loss(
    Tensor log_probs, Tensor old_log_probs, Tensor advantages, Tensor mask, Tensor cu_seqlens, Tensor? token_weights,
    Tensor? carry_in=None, Tensor? vetoed=None, Tensor? sequence_tokens=None, Tensor? counts_sequence=None,
    *, float half_life, float influence_low, float influence_high, float clip_ratio_low, float clip_ratio_high,
    float dual_clip, float safety_threshold, float log_ratio_clamp, float norm_length, int max_dual_clipped,
    str aggregation, bool influence=True, bool with_weights=False
) -> (Tensor loss_sum, Tensor gradient, Tensor metrics, Tensor histograms, Tensor vetoed_out, Tensor future_kl,
      Tensor influence_weights)"""


def _load() -> Any:
    """Return the compiled module, or None if it was not built.

    Raises:
        ValueError: MEGATRON_FIPO_ISA is unknown or not supported by this machine.
    """
    if importlib.util.find_spec("megatron_fipo.ops._extension") is None:
        return None
    module = importlib.import_module("megatron_fipo.ops._extension")
    if module.cpu_isa() is None:
        raise ValueError(
            f"MEGATRON_FIPO_ISA={os.environ['MEGATRON_FIPO_ISA']} is not available on this machine; "
            "use scalar, avx2 or avx512, or unset it for the fastest available"
        )
    return module


_extension = _load()


def summary() -> str:
    """Return what was built and which part is used here, in one line."""
    if _extension is None:
        return "not built; the losses run in plain torch"
    return f"{_extension.BUILD}; in use: {_extension.cpu_isa()}"


def serves(tensor: Tensor) -> bool:
    """Return whether the kernels support the device and dtype of `log_probs` like this tensor."""
    if _extension is None:
        return False
    if tensor.device.type == "cuda":
        return has_cuda() and tensor.dtype in (torch.float32, torch.bfloat16)
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def is_built() -> bool:
    """Return whether the extension was built."""
    return _extension is not None


def module() -> Any:
    """Return the compiled module, or None if it was not built."""
    return _extension


def has_cuda() -> bool:
    """Return whether the extension includes the CUDA kernels."""
    return _extension is not None and bool(_extension.HAS_CUDA)


def num_metrics() -> int:
    """Return the number of scalars in the metrics tensor of `fipo_loss`."""
    return int(_extension.NUM_METRICS)


def histogram_bins() -> int:
    """Return the number of bins of a histogram."""
    return int(_extension.HISTOGRAM_BINS)


def metric_slots() -> dict[str, int]:
    """Return name -> index in the metrics tensor of `fipo_loss`; count and sum of a mean have the mean's name."""
    return dict(_extension.METRIC_SLOTS)


# Checks that inputs match csrc/fipo.h


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _checked(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], like: Tensor
) -> Tensor:
    """Return the contiguous tensor; raise ValueError unless shape, dtype and device match."""
    if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {list(shape)} {wanted}, not {list(tensor.shape)} {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, log_probs on {like.device}; move it there")
    return tensor.contiguous()


def _optional(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], like: Tensor
) -> Tensor | None:
    return None if tensor is None else _checked(name, tensor, shape, dtypes, like)


class _Inputs:
    """Validated tensors, kept alive while a kernel reads them, and the struct that points to them."""

    def __init__(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor | None,
        mask: Tensor,
        cu_seqlens: Tensor,
        advantages: Tensor | None = None,
        token_weights: Tensor | None = None,
    ) -> None:
        if log_probs.dim() != 1 or not serves(log_probs):
            raise ValueError(
                f"log_probs must be [N] float32 on {log_probs.device.type}, "
                f"not {list(log_probs.shape)} {log_probs.dtype}, the only input of compiled ops"
            )
        self.num_tokens, self.num_segments = log_probs.numel(), cu_seqlens.numel() - 1
        for name, number in (("tokens", self.num_tokens), ("sequences", self.num_segments)):
            if number > MAX_TOKENS:
                raise ValueError(f"{number} {name} exceed the maximum of {MAX_TOKENS} per call; split them")
        check_offsets(cu_seqlens, self.num_tokens)
        same, floats, size = (log_probs.dtype,), (torch.float32,), (self.num_tokens,)
        self.log_probs = log_probs.contiguous()
        self.old = _optional("old_log_probs", old_log_probs, size, same, log_probs)
        self.mask = _checked("mask", mask, size, (torch.bool, torch.uint8), log_probs)
        self.offsets = _checked(
            "cu_seqlens", cu_seqlens, (self.num_segments + 1,), (torch.int32, torch.int64), log_probs
        ).long()
        per_token = advantages is not None and tuple(advantages.shape) == size
        wanted = size if per_token else (self.num_segments,)
        self.advantages = _optional("advantages", advantages, wanted, floats, log_probs)
        self.token_weights = _optional("token_weights", token_weights, size, floats, log_probs)
        self.struct = _extension.Tokens(
            log_probs=_address(self.log_probs),
            old_log_probs=_address(self.old),
            mask=_address(self.mask),
            offsets=_address(self.offsets),
            advantages=_address(self.advantages),
            token_weights=_address(self.token_weights),
            num_tokens=self.num_tokens,
            num_segments=self.num_segments,
            advantages_per_token=per_token,
            bfloat16=log_probs.dtype == torch.bfloat16,
        )

    def per_segment(self, name: str, tensor: Tensor | None, *dtypes: torch.dtype) -> Tensor | None:
        return _optional(name, tensor, (self.num_segments,), dtypes, self.log_probs)

    def token_output(self) -> Tensor:  # [N] float32
        return torch.empty(self.num_tokens, dtype=torch.float32, device=self.log_probs.device)

    def segment_output(self, dtype: torch.dtype) -> Tensor:  # [S]
        return torch.empty(self.num_segments, dtype=dtype, device=self.log_probs.device)


# Kernel calls


def _run_scan(inputs: _Inputs, constants: Any, carry_in: Tensor | None, out: Any) -> None:
    if inputs.log_probs.device.type == "cpu":
        _extension.scan_cpu(inputs.struct, constants, _address(carry_in), out, torch.get_num_threads())
        return
    device = inputs.log_probs.device
    with torch.cuda.device(device):
        size = _extension.scan_cuda_workspace(inputs.num_tokens, inputs.num_segments)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        _extension.scan_cuda(inputs.struct, constants, _address(carry_in), out, _address(workspace), stream)


def _run_loss(inputs: _Inputs, constants: Any, shard: Any, out: Any) -> None:
    if inputs.log_probs.device.type == "cpu":
        _extension.loss_cpu(inputs.struct, constants, shard, out, torch.get_num_threads())
        return
    device = inputs.log_probs.device
    with torch.cuda.device(device):
        size = _extension.loss_cuda_workspace(inputs.num_tokens, inputs.num_segments)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        _extension.loss_cuda(inputs.struct, constants, shard, out, _address(workspace), stream)


def future_kl_scan(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    mask: Tensor,
    cu_seqlens: Tensor,
    half_life: float,
    log_ratio_clamp: float,
    log_dual_clip: float,
    carry_in: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run `megatron_fipo::future_kl_scan`."""
    inputs = _Inputs(log_probs, old_log_probs, mask, cu_seqlens)
    carry_in = inputs.per_segment("carry_in", carry_in, torch.float32)
    future_kl, carry_out = inputs.token_output(), inputs.segment_output(torch.float32)
    constants = _extension.Constants(half_life=half_life, log_ratio_clamp=log_ratio_clamp, log_dual_clip=log_dual_clip)
    out = _extension.ScanOutput(future_kl=_address(future_kl), carry_out=_address(carry_out))
    _run_scan(inputs, constants, carry_in, out)
    return future_kl, carry_out


def chunk_summary(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    half_life: float,
    log_ratio_clamp: float,
    log_dual_clip: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `megatron_fipo::chunk_summary`."""
    inputs = _Inputs(log_probs, old_log_probs, mask, cu_seqlens, advantages)
    carry_out = inputs.segment_output(torch.float32)
    dual_clipped, loss_tokens = inputs.segment_output(torch.int64), inputs.segment_output(torch.int64)
    constants = _extension.Constants(half_life=half_life, log_ratio_clamp=log_ratio_clamp, log_dual_clip=log_dual_clip)
    out = _extension.ScanOutput(
        carry_out=_address(carry_out), dual_clipped=_address(dual_clipped), loss_tokens=_address(loss_tokens)
    )
    _run_scan(inputs, constants, None, out)
    return carry_out, dual_clipped, loss_tokens


def _loss_constants(
    *,
    half_life: float,
    influence_low: float,
    influence_high: float,
    clip_ratio_low: float,
    clip_ratio_high: float,
    dual_clip: float,
    safety_threshold: float,
    log_ratio_clamp: float,
    norm_length: float,
    max_dual_clipped: int,
    aggregation: str,
    influence: bool = True,
) -> Any:
    """Return the constants of `fipo_loss` as csrc/fipo.h defines them."""
    return _extension.Constants(
        half_life=half_life,
        log_ratio_clamp=log_ratio_clamp,
        log_dual_clip=math.log(dual_clip),
        dual_clip=dual_clip,
        ratio_low=1 - clip_ratio_low,
        ratio_high=1 + clip_ratio_high,
        influence_low=influence_low,
        influence_high=influence_high,
        safety_threshold=safety_threshold,
        clipped_below=influence_low + CLIP_BOUND_TOLERANCE,
        clipped_above=influence_high - CLIP_BOUND_TOLERANCE,
        norm_length=norm_length,
        max_dual_clipped=max_dual_clipped,
        aggregation=AGGREGATIONS.index(aggregation),
        influence=influence,
    )


def fipo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor,
    token_weights: Tensor | None,
    carry_in: Tensor | None = None,
    vetoed: Tensor | None = None,
    sequence_tokens: Tensor | None = None,
    counts_sequence: Tensor | None = None,
    *,
    with_weights: bool = False,
    **constants: Any,
) -> tuple[Tensor, ...]:
    """Run `megatron_fipo::fipo_loss`; `constants` are those of its schema, `LOSS`."""
    inputs = _Inputs(log_probs, old_log_probs, mask, cu_seqlens, advantages, token_weights)
    carry_in = inputs.per_segment("carry_in", carry_in, torch.float32)
    vetoed = inputs.per_segment("vetoed", vetoed, torch.bool, torch.uint8)
    sequence_tokens = inputs.per_segment("sequence_tokens", sequence_tokens, torch.int64)
    counts_sequence = inputs.per_segment("counts_sequence", counts_sequence, torch.bool, torch.uint8)
    if counts_sequence is not None and sequence_tokens is None:
        raise ValueError("counts_sequence needs sequence_tokens: the loss tokens of each segment's whole sequence")
    shard = _extension.Shard(
        carry_in=_address(carry_in),
        vetoed=_address(vetoed),
        sequence_tokens=_address(sequence_tokens),
        counts_sequence=_address(counts_sequence),
    )
    gradient, vetoed_out = inputs.token_output(), inputs.segment_output(torch.bool)
    loss_sum = torch.empty((), dtype=torch.float32, device=log_probs.device)
    metrics = torch.empty(_extension.NUM_METRICS, dtype=torch.float64, device=log_probs.device)
    histograms = torch.empty(2, _extension.HISTOGRAM_BINS, dtype=torch.int64, device=log_probs.device)
    weights = [inputs.token_output() if with_weights else log_probs.new_empty(0, dtype=torch.float32) for _ in range(2)]
    out = _extension.LossOutput(
        gradient=_address(gradient),
        future_kl=_address(weights[0]) if with_weights else 0,
        influence_weights=_address(weights[1]) if with_weights else 0,
        loss_sum=_address(loss_sum),
        metrics=_address(metrics),
        histograms=_address(histograms),
        vetoed=_address(vetoed_out),
    )
    _run_loss(inputs, _loss_constants(**constants), shard, out)
    return loss_sum, gradient, metrics, histograms, vetoed_out, *weights
