"""Factory of the configured rollout engine."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from megatron_fipo.config import Config
from megatron_fipo.model.architecture import architecture
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.rollout.hf import HFEngine
from megatron_fipo.rollout.protocol import RolloutEngine
from megatron_fipo.rollout.vllm import ServedModel, VLLMEngine


def make_engine(config: Config, hf_config: PretrainedConfig, topology: Topology) -> RolloutEngine:
    """Return the rollout engine of a configuration."""
    arch = architecture(hf_config)
    routed = arch if config.moe.routing_replay == "rollout" else None
    if config.rollout.engine == "vllm":
        return VLLMEngine(config, topology, model=ServedModel(arch.vocab_size, routed))
    return HFEngine(hf_config, getattr(torch, config.model.dtype), topology.device, config.rollout.batch_size, routed)
