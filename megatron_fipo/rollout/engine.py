"""Factory of the configured rollout engine."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from megatron_fipo.config import Config
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.rollout.hf import HFEngine
from megatron_fipo.rollout.protocol import RolloutEngine
from megatron_fipo.rollout.vllm import VLLMEngine


def make_engine(config: Config, hf_config: PretrainedConfig, topology: Topology) -> RolloutEngine:
    """Return the rollout engine of a configuration."""
    if config.rollout.engine == "vllm":
        return VLLMEngine(config, topology, vocabulary=hf_config.vocab_size)
    return HFEngine(hf_config, getattr(torch, config.model.dtype), topology.device, config.rollout.batch_size)
