"""Parts of a served model that can be compared with the tensors that it was sent. Pure torch.

vLLM fuses some of the published tensors into one parameter, rearranges others for a kernel, and gives each worker of a
server with tensor parallelism a shard of most. Letters: E experts, I their intermediate size, H hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

_FUSED = {  # vLLM's module: the published ones that it is made of, one below the other
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
EXPERTS = {  # vLLM's parameter of all experts of a layer, [E, 2 * I, H] and [E, H, I]: the published ones of each
    "w13_weight": ("gate_proj", "up_proj"),
    "w2_weight": ("down_proj",),
}


def comparable(
    parameters: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], as_sent: Collection[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (published name, the model's value of it) of all that this worker holds whole and as it was sent.

    A shard, and what is padded, is known by its shape, which is another than was sent.

    Args:
        parameters: the model's, by vLLM's names.
        shapes: of the tensors that were received, by their published names.
        as_sent: names of those experts' parameters that their kernel does not rearrange, which no shape shows.
    """
    for name, parameter in parameters.items():
        module, _, leaf = name.rpartition(".")
        if leaf in EXPERTS:
            if name in as_sent:
                yield from _experts(f"{module.partition('.experts')[0]}.experts", EXPERTS[leaf], parameter, shapes)
            continue
        prefix, _, last = module.rpartition(".")
        yield from _rows([f"{prefix}.{part}.{leaf}" for part in _FUSED.get(last, ())] or [name], parameter, shapes)


def _experts(
    prefix: str, parts: Sequence[str], parameter: torch.Tensor, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of each expert, unless there are more of them than this worker holds."""
    if f"{prefix}.{len(parameter)}.{parts[0]}.weight" in shapes:
        return
    for number, expert in enumerate(parameter):
        yield from _rows([f"{prefix}.{number}.{part}.weight" for part in parts], expert, shapes)


def _rows(
    names: Sequence[str], parameter: torch.Tensor, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of these names if the parameter is made of all their rows."""
    found = [shapes[name] for name in names if name in shapes]
    if parameter.ndim == 0 or len(found) < len(names):
        return
    rows = [shape[0] for shape in found if len(shape) == parameter.ndim and shape[1:] == parameter.shape[1:]]
    if len(rows) == len(names) and sum(rows) == len(parameter):
        yield from zip(names, parameter.detach().split(rows), strict=True)
