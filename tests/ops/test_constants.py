"""Constants that Python and the kernels both have are the same numbers."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from megatron_fipo.algorithm import FIPOLossConfig, loss_config, metrics
from megatron_fipo.config import AlgorithmConfig, RolloutConfig
from megatron_fipo.config.loss import AGGREGATIONS, MAX_LOG_WEIGHT, SAFE_CLIP, Aggregation, LossConfig
from megatron_fipo.config.setting import settings
from megatron_fipo.ops import extension

needs_extension = pytest.mark.skipif(not extension.is_built(), reason="the extension is not built")


@pytest.fixture
def exported() -> Any:
    """The compiled module."""
    return extension.module()


@needs_extension
def test_constants_of_the_kernels(exported: Any) -> None:
    """Names and order of aggregations, bounds of the safety rule in float32, the bound of exp(S)."""
    assert dict(exported.AGGREGATIONS) == {name: index for index, name in enumerate(AGGREGATIONS)}
    assert list(exported.SAFE_CLIP) == torch.tensor(SAFE_CLIP, dtype=torch.float32).tolist()
    assert exported.MAX_LOG_WEIGHT == MAX_LOG_WEIGHT


@needs_extension
def test_histograms_of_the_kernels(exported: Any) -> None:
    """Range, resolution and number of bins."""
    assert exported.HISTOGRAM_RANGE == metrics.LOG_RATIO_RANGE
    assert exported.HISTOGRAM_BINS_PER_NAT == metrics.BINS_PER_NAT
    assert exported.HISTOGRAM_BINS == metrics.BINS


def test_the_loss_has_the_settings_of_a_run() -> None:
    """The same names, defaults and ranges, and one more; legal aggregations are those of the annotation."""
    shared = {s.name: s for s in settings(LossConfig)}
    for cls, more in (
        (AlgorithmConfig, {"loss", "influence", "kl_coefficient", "entropy_coefficient"}),
        (FIPOLossConfig, {"norm_length"}),
    ):
        found = {s.name: s for s in settings(cls)}
        assert found.keys() == shared.keys() | more
        assert {name: found[name] for name in shared} == shared
    assert get_args(Aggregation) == AGGREGATIONS
    assert settings(LossConfig)[-1].choices == AGGREGATIONS


def test_the_loss_of_a_run() -> None:
    """Every setting reaches the loss, with the run's maximum response length."""
    changed = {
        "half_life": 16.0,
        "influence_clip": None,
        "safety_threshold": 3.0,
        "clip_ratio_low": 0.1,
        "clip_ratio_high": 0.3,
        "dual_clip": 4.0,
        "log_ratio_clamp": 10.0,
        "max_dual_clipped_tokens": None,
        "aggregation": "seq-mean-token-mean",
    }
    assert changed.keys() == {s.name for s in settings(LossConfig)}
    found = loss_config(AlgorithmConfig(**changed), RolloutConfig(max_response_tokens=7))
    assert found == FIPOLossConfig(**changed, norm_length=7)
    assert found.influence_bounds == (0.0, 10.0)
