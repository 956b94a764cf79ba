"""Differences between the releases of Megatron-Core that may be installed, 0.16.1 to 0.19, in one place.

Each function names the release from which on it differs, and asks for what is there instead of a version's number. The
functions of Megatron-Core that this project calls or overrides without a promise that they stay are listed in
tests/megatron/test_signatures.py, which compares their signatures.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch

_NOTICES = {
    "distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",  # since 0.18
    "models.gpt.gpt_model": "GPTModel IS DEPRECATED",  # since 0.19: no new features, of which this project needs none
}


def gradients_for_norm(optimizer: Any) -> list[torch.Tensor]:
    """Return the gradients of an optimizer of Megatron-Core that count in the norm, each on one rank alone."""
    if hasattr(optimizer, "get_main_grads_for_grad_norm"):  # until 0.18
        return list(optimizer.get_main_grads_for_grad_norm())
    return list(optimizer.get_grads_for_grad_norm())  # since 0.19


def quiet_notices() -> None:
    """Drop what Megatron-Core logs as a warning at every start, though it asks nothing of a user; call it once."""
    for module, beginning in _NOTICES.items():
        logging.getLogger(f"megatron.core.{module}").addFilter(partial(_is_other, beginning))


def _is_other(beginning: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(beginning)


def name_missing_kernels() -> None:
    """Give 0.16 the name of a kernel of Transformer Engine that its routers read, also where there is none."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
