"""CPU backend for Megatron-Core: redirects its unconditional CUDA calls to the CPU.

Megatron-Core asks for `torch.cuda.current_device()`, passes `device="cuda"` literals, keeps its random states in
the CUDA generator and compares parameter types with `"torch.cuda.FloatTensor"`. `install` redirects those calls; it
does nothing on a machine with a GPU, and must run before the first `import megatron.core`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

_FACTORIES = ("tensor", "zeros", "ones", "empty", "empty_like", "full", "arange")
_installed = False


def install() -> bool:
    """Redirect CUDA calls to the CPU; return whether this process uses the CPU backend."""
    global _installed
    if torch.cuda.is_available():
        return False
    if not _installed:
        _redirect_device()
        _redirect_random_states()
        _redirect_streams()
        _redirect_expert_counts()
        _installed = True
    return True


def _redirect_device() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.set_device = lambda *args, **kwargs: None
    # `with torch.device(...)` affects the functions in this cached set, which must be torch's own: with the wrappers in
    # it, `transformers.from_pretrained` would silently leave rotary frequencies uninitialized.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def _redirect_random_states() -> None:
    cuda: Any = torch.cuda
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()


class _NoStream:
    """Replacement for CUDA streams and events: CPU operations are already ordered."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., _NoStream]:
        return lambda *args, **kwargs: self


def _redirect_streams() -> None:
    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = _NoStream
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _NoStream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda self, stream: None


def _redirect_expert_counts() -> None:
    """Convert numbers of tokens per expert to numpy arrays.

    Megatron does so only for GPU tensors, but then calls functions that do not accept tensors.
    """
    from megatron.core.transformer.moe import token_dispatcher

    def to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_numpy


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """Make `tensor.type()` of a CPU tensor return the CUDA type name, which Megatron's optimizers compare.

    Used only where an optimizer is built or stepped, since other libraries rely on `type()`.
    """
    if not _installed:
        yield
        return
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    tensor: Any = torch.Tensor
    tensor.type = type_name
    try:
        yield
    finally:
        tensor.type = original
