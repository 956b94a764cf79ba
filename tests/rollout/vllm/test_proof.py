"""Parameters of a worker as vLLM holds them, of a server on 1, 2 or 4 GPUs: what is compared, and that it is right."""

from __future__ import annotations

import pytest
import torch

from megatron_fipo.rollout.vllm.worker.fipo_proof import comparable

HIDDEN, HEADS, KV_HEADS, WIDTH, FFN, EXPERTS, VOCABULARY = 8, 4, 2, 4, 12, 6, 40
LAYER = "model.layers.0."
Tensors = dict[str, torch.Tensor]


def _sent() -> Tensors:
    """Return published tensors: a dense layer, and the experts of another."""
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        LAYER + "input_layernorm.weight": (HIDDEN,),
        LAYER + "self_attn.q_proj.weight": (HEADS * WIDTH, HIDDEN),
        LAYER + "self_attn.k_proj.weight": (KV_HEADS * WIDTH, HIDDEN),
        LAYER + "self_attn.v_proj.weight": (KV_HEADS * WIDTH, HIDDEN),
        LAYER + "self_attn.q_proj.bias": (HEADS * WIDTH,),
        LAYER + "self_attn.k_proj.bias": (KV_HEADS * WIDTH,),
        LAYER + "self_attn.v_proj.bias": (KV_HEADS * WIDTH,),
        LAYER + "self_attn.o_proj.weight": (HIDDEN, HEADS * WIDTH),
        LAYER + "mlp.gate_proj.weight": (FFN, HIDDEN),
        LAYER + "mlp.up_proj.weight": (FFN, HIDDEN),
        LAYER + "mlp.down_proj.weight": (HIDDEN, FFN),
        "model.layers.1.mlp.gate.weight": (EXPERTS, HIDDEN),
    }
    for expert in range(EXPERTS):
        prefix = f"model.layers.1.mlp.experts.{expert}."
        shapes |= {prefix + f"{part}_proj.weight": (FFN, HIDDEN) for part in ("gate", "up")}
        shapes[prefix + "down_proj.weight"] = (HIDDEN, FFN)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _held(sent: Tensors, ranks: int, rank: int) -> Tensors:
    """Return a worker's parameters: fused, its shard of what is split, the vocabulary padded to 64."""

    def rows(name: str) -> torch.Tensor:
        return sent[name].chunk(ranks)[rank]

    def columns(name: str) -> torch.Tensor:
        return sent[name].chunk(ranks, dim=-1)[rank]

    def fused(prefix: str, parts: tuple[str, ...], leaf: str = "weight") -> torch.Tensor:
        return torch.cat([rows(f"{prefix}{part}_proj.{leaf}") for part in parts])

    qkv, gate_up = ("q", "k", "v"), ("gate", "up")
    experts = [f"model.layers.1.mlp.experts.{e}." for e in range(EXPERTS)]
    routed = "model.layers.1.mlp.experts.routed_experts."
    return {
        "model.embed_tokens.weight": torch.cat([sent["model.embed_tokens.weight"], torch.zeros(24, HIDDEN)]),
        **{name: sent[name] for name in (LAYER + "input_layernorm.weight", "model.layers.1.mlp.gate.weight")},
        LAYER + "self_attn.qkv_proj.weight": fused(LAYER + "self_attn.", qkv),
        LAYER + "self_attn.qkv_proj.bias": fused(LAYER + "self_attn.", qkv, "bias"),
        LAYER + "self_attn.o_proj.weight": columns(LAYER + "self_attn.o_proj.weight"),
        LAYER + "mlp.gate_up_proj.weight": fused(LAYER + "mlp.", gate_up),
        LAYER + "mlp.down_proj.weight": columns(LAYER + "mlp.down_proj.weight"),
        routed + "w13_weight": torch.stack([fused(expert, gate_up) for expert in experts]),
        routed + "w2_weight": torch.stack([columns(expert + "down_proj.weight") for expert in experts]),
        LAYER + "self_attn.attn.k_scale": torch.tensor(1.0),  # what no checkpoint has
    }


def _compared(held: Tensors, sent: Tensors, as_sent: bool = True) -> dict[str, torch.Tensor]:
    shapes = {name: tensor.shape for name, tensor in sent.items()}
    return dict(comparable(held, shapes, {name for name in held if "experts" in name} if as_sent else ()))


def _unequal(compared: Tensors, sent: Tensors) -> list[str]:
    return [name for name, value in compared.items() if not torch.equal(value, sent[name])]


def test_one_gpu_holds_all_but_the_padded_vocabulary() -> None:
    sent = _sent()
    compared = _compared(_held(sent, 1, 0), sent)
    assert set(sent) - set(compared) == {"model.embed_tokens.weight"}
    assert _unequal(compared, sent) == []


@pytest.mark.parametrize(("ranks", "rank"), [(2, 0), (2, 1), (4, 0), (4, 3)])
def test_what_is_split_is_left_out(ranks: int, rank: int) -> None:
    """Also the projections whose columns are split, which have as many rows as were sent."""
    sent = _sent()
    compared = _compared(_held(sent, ranks, rank), sent)
    assert set(compared) == {LAYER + "input_layernorm.weight", "model.layers.1.mlp.gate.weight"}
    assert _unequal(compared, sent) == []


@pytest.mark.parametrize("first", [0, 3])
def test_a_part_of_the_experts_is_left_out(first: int) -> None:
    """Expert parallelism: a worker's first expert need not be the layer's."""
    sent = _sent()
    held = _held(sent, 1, 0)
    held |= {name: value[first : first + 3] for name, value in held.items() if "routed_experts" in name}
    assert not [name for name in _compared(held, sent) if ".experts." in name]


def test_rearranged_experts_are_left_out() -> None:
    sent = _sent()
    compared = _compared(_held(sent, 1, 0), sent, as_sent=False)
    assert not [name for name in compared if ".experts." in name]
    assert len(compared) == len(sent) - 1 - 3 * EXPERTS


@pytest.mark.parametrize(
    ("parameter", "index", "published"),
    [
        (LAYER + "mlp.gate_up_proj.weight", (FFN, 0), LAYER + "mlp.up_proj.weight"),
        (LAYER + "self_attn.qkv_proj.bias", (HEADS * WIDTH,), LAYER + "self_attn.k_proj.bias"),
        (
            "model.layers.1.mlp.experts.routed_experts.w13_weight",
            (4, FFN + 1, 2),
            "model.layers.1.mlp.experts.4.up_proj.weight",
        ),
        (
            "model.layers.1.mlp.experts.routed_experts.w2_weight",
            (5, 1, 2),
            "model.layers.1.mlp.experts.5.down_proj.weight",
        ),
    ],
)
def test_a_wrong_number_is_found(parameter: str, index: tuple[int, ...], published: str) -> None:
    sent = _sent()
    held = _held(sent, 1, 0)
    held[parameter][index] += 1
    assert _unequal(_compared(held, sent), sent) == [published]
