"""Published parameter names of a transformers model, which stores all experts of a layer in one tensor."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def published_parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return every tensor of the model's checkpoints by name: a parameter, or an expert's view of one."""
    mixtral = model.config.model_type == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if mixtral:
            name = name.replace(".mlp.", ".block_sparse_moe.")
        experts, _, kind = name.rpartition(".")
        if kind == "gate_up_proj" and experts.endswith(".experts"):
            for expert, fused in enumerate(parameter.detach()):
                halves = fused.chunk(2)
                found |= {f"{experts}.{expert}.{x}.weight": half for x, half in zip((gate, up), halves, strict=True)}
        elif kind == "down_proj" and experts.endswith(".experts"):
            found |= {f"{experts}.{expert}.{down}.weight": one for expert, one in enumerate(parameter.detach())}
        else:
            found[name] = parameter
    return found
