"""Rollouts by vLLM servers, reached over HTTP."""

from megatron_fipo.rollout.vllm.engine import VLLMEngine

__all__ = ["VLLMEngine"]
