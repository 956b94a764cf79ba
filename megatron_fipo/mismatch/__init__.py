"""Comparison of the trainer with the rollout engine, layer by layer: `megatron-fipo mismatch`."""
