"""Differences between releases of Megatron-Core."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from megatron_fipo.parallel import megatron_versions


@pytest.mark.parametrize("method", ["get_main_grads_for_grad_norm", "get_grads_for_grad_norm"])
def test_gradients_for_norm(method: str) -> None:
    """By the name of each release."""
    gradients = [torch.ones(2), torch.zeros(3)]
    assert megatron_versions.gradients_for_norm(SimpleNamespace(**{method: lambda: gradients})) == gradients


@pytest.mark.parametrize("module", megatron_versions._NOTICES)
def test_notices(module: str, caplog: pytest.LogCaptureFixture) -> None:
    """A notice is dropped, another warning of the same module is not."""
    logger = logging.getLogger(f"megatron.core.{module}")
    for text in (megatron_versions._NOTICES[module] + " and more", "another"):
        logger.warning(text)
    assert caplog.messages == ["another"]
