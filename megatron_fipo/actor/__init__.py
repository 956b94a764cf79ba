"""The actor: the policy on Megatron ranks behind NeMo-Aligner's verbs."""

from megatron_fipo.actor.actor import FIPOActor
from megatron_fipo.actor.optimizer import GradientError, UpdateStatistics

__all__ = ["FIPOActor", "GradientError", "UpdateStatistics"]
