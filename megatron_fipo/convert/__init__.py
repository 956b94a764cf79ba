"""Hugging Face checkpoints to Megatron shards and back."""
