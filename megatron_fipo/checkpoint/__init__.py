"""Checkpoints of a run: written while training goes on, whole or not at all, and checked before they are loaded."""

import megatron_fipo.parallel  # noqa: F401  sets up the CPU backend before Megatron is imported
from megatron_fipo.checkpoint.checkpointer import Checkpointer

__all__ = ["Checkpointer"]
