"""Which kernel attention takes, and that one call for all sequences computes what a call for each does."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.model import attention
from megatron_fipo.model.attention import PackedSequences, flash, flash_takes
from tests.gpu.kernels import attend, attend_by_definition
from tests.gpu.updates import relative_error
from tests.support.flash_emulation import flash_on_the_cpu

LENGTHS = [[1], [1, 1, 130], [5, 1, 77, 12]]


@pytest.fixture(scope="module")
def _world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"shape": (10, 4, 192)}, True),
        ({"dtype": torch.float32}, False),
        ({"shape": (10, 4, 20)}, False),
        ({"shape": (10, 4, 256)}, False),
        ({"is_cuda": False}, False),
        ({"device": "old"}, False),
    ],
)
def test_what_takes_flash_attention(changes: dict[str, Any], taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bits, heads that its kernels know, and a GPU that has it; everything else goes by sequences as before."""
    monkeypatch.setattr(attention, "_gpu_has_flash", lambda device: device == "new")
    query: Any = SimpleNamespace(
        **{"is_cuda": True, "dtype": torch.bfloat16, "shape": (10, 4, 128), "device": "new", **changes}
    )
    assert flash_takes(query) == taken


def test_no_flash_attention_on_the_cpu() -> None:
    """Whatever the precision."""
    assert not any(flash_takes(torch.zeros(3, 2, 64, dtype=d)) for d in (torch.float32, torch.bfloat16))


@pytest.mark.parametrize(
    ("capability", "built", "has"), [((7, 5), True, False), ((8, 0), True, True), ((9, 0), False, False)]
)
def test_which_gpus_have_it(
    capability: tuple[int, int], built: bool, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs since sm_80 are served, if torch was built with flash attention."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    attention._gpu_has_flash.cache_clear()
    try:
        assert attention._gpu_has_flash(torch.device("cuda", 0)) == has
    finally:
        attention._gpu_has_flash.cache_clear()


@pytest.mark.usefixtures("_world")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (7, 1)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_one_call_is_a_call_for_each(lengths: list[int], heads: int, kv_heads: int) -> None:
    """Output and gradients, through torch's own dispatch and derivative of the operator, whose kernels are emulated."""
    with flash_on_the_cpu() as calls:
        one = attend("cpu", torch.float32, lengths, heads, kv_heads)
    assert calls == [(len(lengths), max(2, *lengths))]
    each = attend("cpu", torch.float32, lengths, heads, kv_heads)
    for a, b, c in zip(one, each, attend_by_definition(lengths, heads, kv_heads), strict=True):
        assert float(c.norm()) == 0 or (relative_error(a, c) < 1e-5 and relative_error(b, c) < 1e-5)


def test_the_operator_takes_these_arguments() -> None:
    """The installed torch's, of which only kernels for GPUs exist: shapes alone, as its own rule computes them."""
    q, k = (torch.empty(10, heads, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    packed = PackedSequences.of(torch.empty(3, dtype=torch.int32, device="meta"), (7, 3))
    out = flash(q.requires_grad_(), k, k, packed, 0.125)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert out.requires_grad
