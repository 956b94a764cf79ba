"""The random states of a rank as tensors of fixed shapes, one row a rank of a sharded tensor."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def sharded(rank: int, world_size: int) -> dict[str, ShardedTensor]:
    """Return this rank's states now; what is loaded into them must be given to `restore`."""
    return {
        name: ShardedTensor(
            key=f"random.{name}",
            data=state[None],
            dtype=state.dtype,
            local_shape=(1, state.numel()),
            global_shape=(world_size, state.numel()),
            global_offset=(rank, 0),
            axis_fragmentations=None,
        )
        for name, state in _states().items()
    }


def restore(states: Mapping[str, torch.Tensor]) -> None:
    """Go on from states that `sharded` described."""
    rows = {name: state[0].cpu() for name, state in states.items()}
    torch.set_rng_state(rows["torch"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(rows["cuda"])
    python = rows["python"].tolist()
    random.setstate((3, tuple(map(int, python[:625])), python[626] if python[625] else None))
    numpy = rows["numpy"].tolist()
    np.random.set_state(  # noqa: NPY002  libraries draw from the global state
        ("MT19937", np.array(numpy[:624], dtype=np.uint32), int(numpy[624]), int(numpy[625]), numpy[626])
    )
    tracker = get_cuda_rng_tracker()
    tracker.set_states({name: rows[f"megatron.{name}"] for name in tracker.get_states()})


def _states() -> dict[str, torch.Tensor]:
    """`[n]` each; integers below 2^32 are exact in float64."""
    _, integers, gauss = random.getstate()
    numpy: Any = np.random.get_state()  # noqa: NPY002
    _, keys, place, has_gauss, cached = numpy
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([*integers, gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), place, has_gauss, cached], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    tracked: dict[str, Any] = get_cuda_rng_tracker().get_states()
    return states | {f"megatron.{name}": state.clone() for name, state in tracked.items()}
