"""vLLM as the rollout engine: weight updates and generation speed.

Weight updates by transport relative to a copy of the same bytes, and tokens/s relative to vLLM without this package.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_fipo.config import ParallelConfig
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.rollout import Request, Sampling, VLLMEngine
from megatron_fipo.vllm_environment import installed, interpreter
from on_gpu.settings import Settings, free
from train_step import timed

PROMPT, RESPONSE, GPU_SHARE = 128, 512, 0.5  # tokens; the server's share of GPU memory


def servers(settings: Settings) -> dict[str, Any]:
    """Measure weight updates and generation; without a supported vLLM the only result is the reason."""
    try:
        python = installed(interpreter(None)).python
    except ValueError as error:
        return {"vllm": f"not available on this machine: {error}"}
    topology = topologies.initialize(ParallelConfig(), seed=1)
    try:
        weights = _random_weights(settings)
        figures: dict[str, Any] = {"vllm": str(installed(python).version)}
        for transport in settings.transports:
            figures |= _with_server(settings, topology, weights, transport)
        del weights
        free()
    finally:
        topologies.destroy()
    bare = _bare(settings, python)
    return {
        **figures,
        "vllm_bare_tokens_per_second": bare,
        "vllm_over_bare": figures["vllm_tokens_per_second"] / bare,
    }


def _random_weights(settings: Settings) -> dict[str, torch.Tensor]:
    config = AutoConfig.from_pretrained(settings.hf_path())
    with torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, settings.dtype))
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _with_server(
    settings: Settings, topology: Topology, weights: dict[str, torch.Tensor], transport: str
) -> dict[str, Any]:
    """Measure one server on this rank's GPU, or beside it: weight updates, and generation with the first transport."""
    config = settings.config()
    server = replace(
        config.rollout.server,
        placement="colocated" if transport == "ipc" else "local",
        weight_transport=transport,
        gpu_memory_utilization=GPU_SHARE,
        kv_cache_gb=None if settings.device == "cuda" else 0.25,
        verify_weights=0,
    )
    rollout = replace(config.rollout, engine="vllm", max_response_tokens=RESPONSE, server=server)
    config = replace(config, rollout=rollout, data=replace(config.data, max_prompt_tokens=PROMPT))
    engine = VLLMEngine(config, topology)

    def refit() -> None:
        engine.load_weights(iter(weights.items()))

    def copy() -> None:
        for tensor in weights.values():
            tensor.clone()

    try:
        refit()
        pairs = [(timed(refit), timed(copy)) for _ in range(settings.steps)]
        figures: dict[str, Any] = {
            f"refit_{transport}_gb": sum(t.nbytes for t in weights.values()) / 1e9,
            f"refit_{transport}_seconds": statistics.median(r for r, _ in pairs),
            f"refit_{transport}_over_copy": statistics.median(r / c for r, c in pairs),
        }
        return figures | (_speed(settings, engine) if transport == settings.transports[0] else {})
    finally:
        engine.close()


def _requests(settings: Settings) -> Iterator[list[int]]:
    vocabulary = AutoConfig.from_pretrained(settings.hf_path()).vocab_size
    generator = torch.Generator().manual_seed(0)
    for _ in range(16 if settings.is_toy else 256):
        yield torch.randint(vocabulary, (PROMPT,), generator=generator).tolist()


def _speed(settings: Settings, engine: VLLMEngine) -> dict[str, Any]:
    requests = [Request(prompt, number) for number, prompt in enumerate(_requests(settings))]
    sampling = Sampling(1.0, 1.0, 0, RESPONSE, ())  # no stop tokens: all responses have the same length
    engine.generate(requests[:8], sampling)
    seconds = timed(lambda: engine.generate(requests, sampling))
    return {"vllm_tokens_per_second": len(requests) * RESPONSE / seconds}


def _bare(settings: Settings, python: Path) -> float:
    """Return tokens/s of vLLM's offline interface with the same prompts and lengths."""
    task = {
        "model": str(settings.hf_path()),
        "dtype": settings.dtype,
        "share": GPU_SHARE,
        "prompts": list(_requests(settings)),
        "response": RESPONSE,
    }
    script = Path(__file__).with_name("bare_vllm.py")
    ended = subprocess.run([python, script], input=json.dumps(task), capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"vLLM without this package failed:\n{ended.stderr[-3000:]}")
    return float(json.loads(ended.stdout.splitlines()[-1])["tokens_per_second"])
