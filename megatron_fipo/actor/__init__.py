"""The actor: the policy on Megatron ranks behind NeMo-Aligner's verbs."""

import megatron_fipo.parallel  # noqa: F401  sets up the CPU backend before Megatron is imported
from megatron_fipo.actor.actor import FIPOActor
from megatron_fipo.actor.optimizer import GradientError, UpdateStatistics

__all__ = ["FIPOActor", "GradientError", "UpdateStatistics"]
