"""Hidden states of a policy between its layers, by hooks on Megatron's modules.

Points of a model of L decoder layers: 0 is behind the embedding, k behind the k-th layer, L + 1 behind the final norm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from megatron_fipo.batch import MicroBatch
from megatron_fipo.model.policy import PolicyModel


class Probe(Protocol):
    """Observer of hidden states `[n, 1, hidden]`, n tokens of this rank; both return what the model goes on with."""

    def entering(self, point: int, hidden: torch.Tensor) -> torch.Tensor:
        """Take the input of what gives the state at `point`, a decoder layer or the final norm."""

    def leaving(self, point: int, hidden: torch.Tensor) -> torch.Tensor:
        """Take the state at `point`."""


@contextlib.contextmanager
def probed(chunks: Sequence[PolicyModel], probe: Probe) -> Iterator[None]:
    """Let the probe see every forward pass of this rank's model chunks, those of padding included."""
    handles = [handle for chunk in chunks for handle in _hooks(chunk, probe)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def local_tokens(chunk: PolicyModel, micro_batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which rows of this rank's hidden states are tokens, and their positions in their sequences, `[n]` each."""
    positions, padding = micro_batch.position_ids, micro_batch.is_padding
    if chunk.config.sequence_parallel:
        tp = chunk.pg_collection.tp
        positions, padding = (x.chunk(tp.size())[tp.rank()] for x in (positions, padding))
    rows = (~padding).nonzero().squeeze(1)
    return rows, positions[rows]


def _hooks(chunk: PolicyModel, probe: Probe) -> Iterator[Any]:
    """Register hooks; yield their handles."""
    if chunk.pre_process:
        yield chunk.embedding.register_forward_hook(lambda module, args, output: probe.leaving(0, output))
    final_norm = chunk.decoder.final_layernorm
    modules = [(layer.layer_number, layer) for layer in chunk.decoder.layers]
    if final_norm is not None:
        modules.append((chunk.config.num_layers + 1, final_norm))
    for point, module in modules:
        yield module.register_forward_pre_hook(_entering(probe, point), with_kwargs=True)
        yield module.register_forward_hook(_leaving(probe, point))


def _entering(probe: Probe, point: int) -> Any:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (probe.entering(point, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": probe.entering(point, kwargs["hidden_states"])}

    return hook


def _leaving(probe: Probe, point: int) -> Any:
    def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):  # a decoder layer's, with a context
            return (probe.leaving(point, output[0]), *output[1:])
        return probe.leaving(point, output)

    return hook
