"""Hugging Face checkpoints to Megatron shards and back."""

import megatron_fipo.parallel  # noqa: F401  sets up the CPU backend before Megatron is imported
