"""Settings of mixtures of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_fipo.config.setting import section, setting


@section
@dataclass(frozen=True)
class MoEConfig:
    """Mixtures of experts."""

    routing_replay: Literal["none", "update", "rollout"] = setting(
        "none",
        "Experts that an update computes with. none: those that the router chooses under its weights. update: those "
        "that it chose when the old log-probabilities were computed. rollout: those that the rollout engine computed "
        "the response with, also in the old log-probabilities",
        resume="fixed",
    )
    aux_loss: float = setting(
        0.0, "Coefficient of the routers' load-balancing loss, see docs/training.md", resume="fixed", at_least=0
    )
