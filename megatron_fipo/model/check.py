"""Check of a run's config against its model, before any rank starts."""

from __future__ import annotations

from megatron_fipo.config import Config
from megatron_fipo.model.architecture import Architecture, architecture, load_hf_config
from megatron_fipo.shapes.layout import layout_problems


def check_model(config: Config) -> Architecture:
    """Check a run's config against its model before any rank starts.

    Raises:
        ValueError: lists all problems.
    """
    arch = architecture(load_hf_config(config.model.hf_path, config.model.overrides))
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    problems = layout_problems(arch, config.parallel)
    if config.moe.routing_replay != "none" and arch.experts is None:
        problems.append(
            f"moe.routing_replay={config.moe.routing_replay}: {config.model.hf_path} has no experts; set it to none"
        )
    if config.moe.aux_loss and arch.experts is None:
        problems.append(f"moe.aux_loss={config.moe.aux_loss:g}: {config.model.hf_path} has no experts; set it to 0")
    if config.rollout.engine == "vllm":
        problems += _rollout_problems(arch, config.rollout.server.tensor_parallel_size)
    if longest > arch.max_position_embeddings:
        problems.append(
            f"data.max_prompt_tokens {config.data.max_prompt_tokens} + rollout.max_response_tokens "
            f"{config.rollout.max_response_tokens} = {longest} exceeds the model's max_position_embeddings "
            f"{arch.max_position_embeddings}; shorten them or set model.overrides.max_position_embeddings"
        )
    if problems:
        raise ValueError("the model does not fit the configuration:\n" + "\n".join(f"  - {x}" for x in problems))
    return arch


def _rollout_problems(arch: Architecture, tensor: int) -> list[str]:
    """Return what prevents vLLM from splitting attention heads over a server's GPUs."""
    legal = [t for t in range(1, arch.num_heads + 1) if _vllm_splits(arch, t)]
    if tensor in legal:
        return []
    return [
        f"rollout.server.tensor_parallel_size {tensor} does not fit {arch.num_heads} attention heads and "
        f"{arch.num_kv_heads} key/value heads: must be one of {legal}"
    ]


def _vllm_splits(arch: Architecture, tensor: int) -> bool:
    kv_heads = arch.num_kv_heads
    return arch.num_heads % tensor == 0 and max(kv_heads, tensor) % min(kv_heads, tensor) == 0
