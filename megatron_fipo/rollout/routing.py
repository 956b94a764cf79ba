"""Experts that a rollout engine computed each token with: recorded in a transformers model, read from a vLLM server."""

from __future__ import annotations

import base64
import io
from itertools import combinations
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from megatron_fipo.batch import routing_dtype
from megatron_fipo.shapes.architecture import Architecture


def router_of(layer: Any) -> torch.nn.Module | None:
    """Return a transformers decoder layer's router, which returns logits, weights and experts; None without experts."""
    return getattr(layer.mlp, "gate", None)


class RoutingRecorder:
    """Recorder of the experts that a transformers model computes with."""

    def __init__(self, model: PreTrainedModel, arch: Architecture) -> None:
        """Record from now on.

        Raises:
            ValueError: the model has not one router a layer.
        """
        assert arch.experts is not None
        routers = [router for router in map(router_of, model.model.layers) if router is not None]
        if len(routers) != arch.num_layers:
            raise ValueError(
                f"{type(model).__name__} has {len(routers)} routers that are known, but {arch.num_layers} layers: its "
                "routing cannot be recorded; set moe.routing_replay=update"
            )
        self._dtype = routing_dtype(arch.experts.count)
        self._chosen: list[torch.Tensor] = []
        for router in routers:
            router.register_forward_hook(self._record)

    def take(self) -> torch.Tensor:
        """Return the experts of the forward pass since the last call, `[tokens, L, K]`, on the host."""
        chosen, self._chosen = self._chosen, []
        return torch.stack(chosen, dim=1).to(self._dtype).cpu()

    def _record(self, router: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
        self._chosen.append(output[2])


def decode(text: Any, inputs: int, arch: Architecture) -> torch.Tensor:
    """Return the routing in a vLLM server's answer, `[inputs, L, K]` int8 or int16.

    Args:
        text: a NumPy file in base64.
        inputs: tokens that were computed.

    Raises:
        ValueError: it is not the routing of so many tokens by this model.
    """
    assert arch.experts is not None
    shape = (inputs, arch.num_layers, arch.experts.active)
    try:
        experts = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    except Exception as error:  # numpy's reader of headers raises what Python's tokenizer and parser do
        raise ValueError(f"routing that cannot be read: {error}") from None
    if not isinstance(experts, np.ndarray) or experts.dtype not in (np.uint8, np.uint16) or experts.shape != shape:
        found = f"{experts.dtype} {list(experts.shape)}" if isinstance(experts, np.ndarray) else type(experts).__name__
        raise ValueError(
            f"routing of {found}, expected whole numbers {list(shape)} (tokens, layers, experts of a token)"
        )
    columns = np.ascontiguousarray(experts.reshape(-1, shape[2]).T)  # pairs are compared at the memory's speed
    if experts.size and int(columns.max()) >= arch.experts.count:
        raise ValueError(f"routing to expert {int(columns.max())}, but experts are 0 to {arch.experts.count - 1}")
    if any((a == b).any() for a, b in combinations(columns, 2)):
        raise ValueError("routing that sends a token to the same expert twice")
    return torch.from_numpy(experts.astype(np.int16)).to(routing_dtype(arch.experts.count))
