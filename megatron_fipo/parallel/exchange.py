"""Exchange of rollouts between ranks: packed tensors as bytes, with one all-to-all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
import torch.distributed as dist
from safetensors.torch import load, save

from megatron_fipo.batch import Rollouts


def exchange(parts: Sequence[Rollouts], group: dist.ProcessGroup, device: torch.device) -> list[Rollouts]:
    """Send `parts[r]` to rank r of `group`; return what each rank sent here, in rank order. All-to-all."""
    if group.size() == 1:
        return list(parts)
    payloads = [torch.frombuffer(bytearray(_to_bytes(part)), dtype=torch.uint8) for part in parts]
    sizes = torch.tensor([p.numel() for p in payloads], device=device)
    received_sizes = torch.empty_like(sizes)
    dist.all_to_all_single(received_sizes, sizes, group=group)
    received = torch.empty(int(received_sizes.sum()), dtype=torch.uint8, device=device)
    dist.all_to_all_single(
        received,
        torch.cat(payloads).to(device),
        output_split_sizes=received_sizes.tolist(),
        input_split_sizes=sizes.tolist(),
        group=group,
    )
    return [_from_bytes(p.numpy().tobytes()) for p in received.cpu().split(received_sizes.tolist())]


def all_gather(rollouts: Rollouts, group: dist.ProcessGroup, device: torch.device) -> Rollouts:
    """Return all ranks' rollouts, in rank order, on every rank of `group`."""
    return Rollouts.concatenate(exchange([rollouts] * group.size(), group, device))


def _to_bytes(rollouts: Rollouts) -> bytes:
    return save({f.name: getattr(rollouts, f.name).contiguous() for f in fields(rollouts)})


def _from_bytes(data: bytes) -> Rollouts:
    return Rollouts(**load(data))
