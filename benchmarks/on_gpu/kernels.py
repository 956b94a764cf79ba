"""Fused loss and LM head, measured by their own benchmarks."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

import future_kl
import lm_head
from on_gpu.settings import SHAPES, Settings, free

LOSS_SIZES = ("1x20480", "80x256")
FIELDS = ("scan_ms", "fused_ms", "fused_gb_per_s", "fused_share_of_copy", "scan_share_of_copy", "loss_and_backward_ms")


def fused_loss(settings: Settings) -> dict[str, Any]:
    """Measure milliseconds and the share of the copy bandwidth by size, and on a GPU a micro-batch's launches."""
    on_gpu = settings.device == "cuda"
    copy = future_kl.copy_bandwidth(settings.device, settings.seconds)
    figures: dict[str, Any] = {"copy_gb_per_s": copy / 1e9}
    for size in (*LOSS_SIZES, "25M") if on_gpu else LOSS_SIZES:
        row = future_kl.measure(size, settings.device, settings.seconds, copy, False, with_reference=False)
        figures |= {f"loss_{size}_{name}": row[name] for name in FIELDS}
        if on_gpu and size in LOSS_SIZES:
            launched = future_kl.launches(future_kl.make_batch(future_kl.SIZES[size](), "cuda"))
            figures[f"loss_{size}_launches"] = sum(launched.values())
            figures[f"loss_{size}_launched"] = launched
    free()
    return figures


def head(settings: Settings) -> dict[str, Any]:
    """Measure forward and backward against four matmuls of the same size, and peak memory, in the policy's dtype."""
    shape = SHAPES[settings.model if settings.model in SHAPES else "1.5b"]
    tokens = 64 if settings.is_toy else min(settings.tokens, 4096)
    arguments = Namespace(
        device=settings.device,
        dtype=settings.dtype,
        hidden=shape[0],
        vocab=shape[5],
        chunk_tokens=settings.lm_head_chunk,
        rounds=settings.steps,
    )
    torch.manual_seed(1)
    timed = lm_head.measure_time(arguments, tokens)
    free()
    peak = lm_head.measure_peak(arguments, lm_head.chunked(arguments), tokens)
    free()
    return {
        "head_tokens": tokens,
        "head_ms": timed["ours_seconds"] * 1e3,
        "head_four_products_ms": timed["floor_seconds"] * 1e3,
        "head_share_of_products": timed["share_of_floor"],
        "head_naive_ms": timed["naive_seconds"] * 1e3,
        "head_peak_gb": peak["peak_bytes"] / 1e9,
    }
