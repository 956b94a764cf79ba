"""Exchange of rollouts, as bytes with one all-to-all, and of tensors between ranks."""

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


def all_gather_rows(rows: torch.Tensor, group: dist.ProcessGroup, device: torch.device) -> list[torch.Tensor]:
    """Return every rank's `[N, ...]` on the host, in rank order, on every rank of `group`; N may differ, the rest not.

    Two all-gathers: of the sizes, and of the values, padded to the largest.
    """
    if group.size() == 1:
        return [rows]
    sizes = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(group.size())]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=device), group=group)
    counts = [int(size) for size in sizes]
    padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows.to(device)
    everyone = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(everyone, padded, group=group)
    return [values[:count].cpu() for values, count in zip(everyone, counts, strict=True)]


def _to_bytes(rollouts: Rollouts) -> bytes:
    return save({f.name: getattr(rollouts, f.name).contiguous() for f in fields(rollouts)})


def _from_bytes(data: bytes) -> Rollouts:
    return Rollouts(**load(data))
