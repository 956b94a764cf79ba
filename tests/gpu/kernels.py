"""Parts of the policy on a device of choice: attention, rotary embeddings, and the LM head with the loss behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_thd
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

from megatron_fipo.algorithm import FIPOLossConfig, fipo_loss
from megatron_fipo.batch import zigzag_positions
from megatron_fipo.model.attention import PackedAttention, PackedSequences
from megatron_fipo.model.rotation import rotate, rotation
from megatron_fipo.model.sequence_chunks import SequenceChunk, cut_sequences
from megatron_fipo.parallel.lm_head import token_log_probs_and_entropy
from tests.actor import references
from tests.support.actors import actor_of

VOCAB, HIDDEN = 1000, 64
ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"seq_len_interpolation_factor": 2.5},
    "llama3": {"rope_scaling": True, "rope_scaling_factor": 8.0},
}


def attend(
    device: str, dtype: torch.dtype, lengths: Sequence[int], heads: int, kv_heads: int, bounds: Sequence[int] = ()
) -> list[torch.Tensor]:
    """Return output and gradients of q, k and v of packed causal attention, as float32 on the CPU.

    With `bounds`, in sequence chunks between them. Needs a process group.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), n, 64) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes)
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    config: Any = SimpleNamespace()
    groups: Any = SimpleNamespace(cp=dist.group.WORLD)
    attention = PackedAttention(config, 1, None, "self", softmax_scale=None, pg_collection=groups)
    weights = torch.randn(len(q), heads * 64, generator=generator).to(device)
    if bounds:
        chunks = cut_sequences(lengths, bounds)
        outputs = [_attend_chunk(attention, chunk, (q, k, v), ends) for chunk in chunks]
        out = torch.cat([output.detach() for output in outputs])
        for chunk, output in reversed(list(zip(chunks, outputs, strict=True))):
            (output.float() * weights[chunk.start : chunk.end]).sum().backward()
    else:
        out = attention(q, k, v, None, packed_seq_params=PackedSequences.of(ends, lengths))
        (out.float() * weights).sum().backward()
    return [tensor.detach().float().cpu() for tensor in (out, q.grad, k.grad, v.grad)]


def _attend_chunk(
    attention: PackedAttention, chunk: SequenceChunk, inputs: Sequence[torch.Tensor], like: torch.Tensor
) -> torch.Tensor:
    q, k, v = (x[chunk.start : chunk.end] for x in inputs)
    ends = torch.tensor([0, *chunk.lengths], device=like.device).cumsum(0).int()
    return attention(q, k, v, None, packed_seq_params=PackedSequences.of(ends, chunk.lengths, chunk=chunk))


def attend_by_definition(lengths: Sequence[int], heads: int, kv_heads: int) -> list[torch.Tensor]:
    """Return the same, computed by softmax over each sequence in float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), n, 64) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    outputs = []
    for a, b, c in zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True):
        b, c = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (b, c))
        scores = torch.einsum("nhd,mhd->hnm", a, b) / 8.0
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
        outputs.append(torch.einsum("hnm,mhd->nhd", scores.softmax(-1), c).flatten(1))
    out = torch.cat(outputs)
    weights = torch.randn(out.shape, generator=generator)
    (out * weights).sum().backward()
    return [tensor.detach() for tensor in (out, q.grad, k.grad, v.grad)]


def rotated_both_ways(
    device: str, lengths: Sequence[int], rope: str, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return pairs (Megatron's, ours) of this context-parallel rank's rotated tokens and of their gradients.

    Needs a process group, whose ranks share the sequences.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    generator = torch.Generator().manual_seed(rank)
    shape = (sum(lengths) // size, 3, 16)
    tokens, weights = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    options: dict[str, Any] = {"rotary_base": 1_000_000, "use_cpu_initialization": device == "cpu", **ROPE[rope]}
    embedding, results = RotaryEmbedding(16, 1.0, cp_group=dist.group.WORLD, **options), []

    def theirs(x: torch.Tensor) -> torch.Tensor:
        table = embedding.get_emb(max(lengths))
        return _apply_rotary_pos_emb_thd(x, ends, table, cp_group=dist.group.WORLD)

    def ours(x: torch.Tensor) -> torch.Tensor:
        positions = torch.cat([zigzag_positions(length, size, rank) for length in lengths]).to(device)
        return rotate(x, rotation(embedding, positions, max(lengths), dtype))

    for function in (theirs, ours):
        x = tokens.clone().requires_grad_()
        out = function(x)
        out.backward(weights)
        assert x.grad is not None
        results.append((out.detach(), x.grad))
    return list(zip(*results, strict=True))


def swiglu(device: str, dtype: torch.dtype, tokens: int, fused: bool) -> list[torch.Tensor]:
    """Return output and gradient of Megatron's SwiGLU or of the plain formula, as float32 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(tokens, 1, width, generator=generator).to(device, dtype) for width in (96, 48))
    x.requires_grad_()
    gate, other = x.chunk(2, -1)
    out = bias_swiglu_impl(x, None) if fused else F.silu(gate) * other
    out.backward(weights)
    assert x.grad is not None
    return [tensor.detach().float().cpu() for tensor in (out, x.grad)]


class HeadAndLoss:
    """LM head and FIPO loss of three responses; inputs are on the device beforehand."""

    def __init__(self, device: str, dtype: torch.dtype, chunk_tokens: int, lengths: Sequence[int] = (50, 1, 149)):
        generator = torch.Generator().manual_seed(0)
        count = sum(lengths)
        self.chunk_tokens = chunk_tokens
        self.hidden = torch.randn(count, HIDDEN, generator=generator).to(device, dtype).requires_grad_()
        weight = torch.randn(VOCAB, HIDDEN, generator=generator) / 8
        self.weight = weight.to(device, dtype).requires_grad_()
        self.targets = torch.randint(VOCAB, (count,), generator=generator).to(device)
        self.noise = (0.1 * torch.randn(count, generator=generator)).to(device)
        self.advantages = torch.randn(len(lengths), generator=generator).to(device)
        self.mask = (torch.rand(count, generator=generator) < 0.9).to(device)
        self.offsets = torch.tensor([0, *lengths]).cumsum(0).to(device)

    def run(self) -> None:
        """Run forward and backward."""
        log_probs, entropy = self.statistics()
        old = log_probs.detach() - self.noise
        out = fipo_loss(log_probs, old, self.advantages, self.mask, self.offsets, FIPOLossConfig(), backend="compiled")
        (out.loss_sum / out.num_tokens + 0.01 * entropy.mean()).backward()

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        return token_log_probs_and_entropy(
            self.hidden,
            self.weight,
            self.targets,
            vocab_start=0,
            vocab_size=VOCAB,
            temperature=1.0,
            group=None,
            chunk_tokens=self.chunk_tokens,
            fp32_logits=False,
        )

    def results(self) -> list[torch.Tensor]:
        """Return log-probabilities, entropies, and after `run` the gradients of hidden states and head, as float32 on
        the CPU."""
        with torch.no_grad():
            statistics = self.statistics()
        tensors = (*statistics, self.hidden.grad, self.weight.grad)
        return [tensor.detach().float().cpu() for tensor in tensors if tensor is not None]


def experts(path: Path, **model: Any) -> torch.Tensor:
    """Return the output [N, H] of the first layer's experts for random hidden states, as float32 on the CPU.

    Needs a process group. `model` has fields of the config's section.
    """
    with actor_of(path, model=model) as actor, torch.no_grad():
        layer = actor.chunks[0].decoder.layers[0].mlp
        weight = next(layer.parameters())
        hidden = _hidden(actor.arch.hidden_size).to(weight.device, weight.dtype)
        routing = actor.chunks[0].routing
        assert routing is not None
        real = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        routing.layers[0].begin(replayed=None, real=real, records=False, balancing=None)
        return layer(hidden.unsqueeze(1))[0].squeeze(1).float().cpu()


def experts_by_definition(path: Path) -> torch.Tensor:
    """Return the same, computed by `transformers` in float32."""
    model = references.load(path)
    with torch.no_grad():
        out = model.model.layers[0].mlp(_hidden(model.config.hidden_size).unsqueeze(0))
    return (out[0] if isinstance(out, tuple) else out).flatten(0, -2)


def _hidden(size: int) -> torch.Tensor:
    return torch.randn(200, size, generator=torch.Generator().manual_seed(0))
