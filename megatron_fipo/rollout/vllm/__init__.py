"""Rollouts by vLLM: servers of their own, reached over HTTP."""

from megatron_fipo.rollout.vllm.engine import VLLMEngine

__all__ = ["VLLMEngine"]
