"""Comparison of a Megatron checkpoint's logits with transformers' on one prompt, to verify a conversion."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from transformers import AutoModelForCausalLM

from megatron_fipo.config import Config, ModelConfig
from megatron_fipo.convert.distributed import load_distributed
from megatron_fipo.model.architecture import architecture, load_hf_config
from megatron_fipo.model.attention import PackedSequences
from megatron_fipo.model.build import build_policy
from megatron_fipo.model.stop_tokens import load_tokenizer
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.parallel.topology import Topology

_TOLERANCE = 1e-3  # relative to the largest logit; rounding differences of float32 over all layers are far smaller


@dataclass(frozen=True)
class LogitDifference:
    num_tokens: int
    largest: float
    scale: float

    @property
    def is_rounding(self) -> bool:
        return self.largest <= _TOLERANCE * self.scale

    def __str__(self) -> str:
        return (
            f"logits of {self.num_tokens} tokens differ by up to {self.largest:.2g}, of logits up to {self.scale:.3g}"
        )


@torch.no_grad()
def compare_logits(huggingface: Path, megatron: Path, prompt: str) -> LogitDifference:
    """Run both models unsharded in float32 in this process, with the Hugging Face tokenizer and config.

    Raises:
        ValueError: there is no tokenizer, the prompt has no tokens, or the Megatron checkpoint does not fit the config.
    """
    tokenizer = load_tokenizer(huggingface)
    tokens = torch.tensor([tokenizer.encode(prompt)])  # [1, S]
    if not tokens.numel():
        raise ValueError(f"the prompt {prompt!r} has no tokens")
    model = AutoModelForCausalLM.from_pretrained(
        huggingface, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    )
    expected = model(tokens).logits.float()  # [1, S, vocabulary]
    del model
    with _one_rank() as topology:
        found = _megatron_logits(huggingface, megatron, tokens, topology)[..., : expected.shape[-1]]
    return LogitDifference(tokens.numel(), (found - expected).abs().max().item(), expected.abs().max().item())


def _megatron_logits(huggingface: Path, megatron: Path, tokens: torch.Tensor, topology: Topology) -> torch.Tensor:
    config = Config(model=ModelConfig(hf_path=str(huggingface), dtype="float32"))
    arch = architecture(load_hf_config(str(huggingface), {}))
    chunks = build_policy(arch, config, topology)
    load_distributed(chunks, megatron)
    tokens = tokens.to(topology.device)
    ends = torch.tensor([0, tokens.shape[1]], dtype=torch.int32, device=topology.device)
    packed = PackedSequences.of(ends, (tokens.shape[1],))
    positions = torch.arange(tokens.shape[1], device=topology.device).unsqueeze(0)
    return GPTModel.forward(chunks[0].eval(), tokens, positions, None, packed_seq_params=packed).float().cpu()


@contextmanager
def _one_rank() -> Iterator[Topology]:
    """Yield the topology of a single rank."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield topologies.initialize(Config().parallel, seed=1)
    finally:
        topologies.destroy()
        dist.destroy_process_group()
