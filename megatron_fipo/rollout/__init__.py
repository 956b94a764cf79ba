"""Rollout engines: they take the policy's weights and generate responses."""

from megatron_fipo.rollout.engine import make_engine
from megatron_fipo.rollout.hf import HFEngine
from megatron_fipo.rollout.protocol import Request, Response, RolloutEngine, Sampling, derive_seed
from megatron_fipo.rollout.vllm import VLLMEngine

__all__ = ["HFEngine", "Request", "Response", "RolloutEngine", "Sampling", "VLLMEngine", "derive_seed", "make_engine"]
