"""Operations that make the host wait for a GPU, counted on the CPU: reads of numbers, data-dependent shapes."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "equal")
_METHODS = ("tolist", "numpy", "cpu")
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")


class _Reads(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        kwargs = kwargs or {}
        selects = name in _INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        # A mask whose one value is written takes no indices.
        selects &= not (name.startswith("index_put") and args[2].numel() == 1)
        counts = (
            name == "repeat_interleave" and kwargs.get("output_size") is None and isinstance(args[-1], torch.Tensor)
        )
        if name in _READS or selects or counts:
            self.found[f"{_caller()} {name}"] += 1
        return function(*args, **kwargs)


def _caller() -> str:
    """Return the innermost file of a frame outside torch, and of this one."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "torch" not in path.parts and path != Path(__file__):
            return path.name
        frame = frame.f_back  # type: ignore[assignment]
    return "autograd"


@contextmanager
def counted_syncs() -> Iterator[Counter[str]]:
    """Yield how often each "FILE OPERATION" would wait for a GPU inside, forward and backward."""
    found: Counter[str] = Counter()
    real = {name: getattr(torch.Tensor, name) for name in _METHODS}

    def counting(name: str) -> Any:
        def method(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            found[f"{_caller()} {name}"] += 1
            return real[name](self, *args, **kwargs)

        return method

    for name in _METHODS:
        setattr(torch.Tensor, name, counting(name))
    try:
        with _Reads(found):
            yield found
    finally:
        for name, method in real.items():
            setattr(torch.Tensor, name, method)
