"""The parts of a process that the CPU backend must leave alone."""

from __future__ import annotations

import pytest
import torch

from megatron_fipo.parallel import cpu_backend


@pytest.mark.parametrize("name", cpu_backend._FACTORIES)
def test_device_contexts_still_act(name: str) -> None:
    """`with torch.device("meta")` makes meta tensors, which `transformers.from_pretrained` builds its models with."""
    cpu_backend.install()
    arguments = {"tensor": ([1.0],), "full": ((2,), 1.0), "empty_like": (torch.ones(2, device="meta"),)}
    with torch.device("meta"):
        assert getattr(torch, name)(*arguments.get(name, (2,))).is_meta
