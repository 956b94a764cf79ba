"""Rollouts by vLLM servers, reached over HTTP."""

from megatron_fipo.rollout.vllm.engine import VLLMEngine
from megatron_fipo.rollout.vllm.served_model import ServedModel

__all__ = ["ServedModel", "VLLMEngine"]
