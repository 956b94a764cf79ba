"""Full collections come when they are asked for, and memory does not grow over steps between them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.parallel.garbage import collected_by_hand
from tests.support.actors import actor_of
from tests.support.checkpoint_runs import update
from tests.support.policies import make_qwen2
from tests.support.ranks import run_ranks


@pytest.fixture(autouse=True)
def _imports_stay_frozen() -> Iterator[None]:
    """Freeze imports again, as conftest.py has done."""
    yield
    gc.collect()
    gc.freeze()


class _Cycle:
    def __init__(self) -> None:
        self.me = self


def _full_collections() -> int:
    return int(gc.get_stats()[2]["collections"])


def test_full_collections_come_by_hand() -> None:
    """Although ever more objects survive; young cycles go at once, old ones when they are asked for."""
    generations, frozen = gc.get_threshold(), gc.get_freeze_count()
    with collected_by_hand() as collect:
        assert gc.get_freeze_count() > frozen
        before, kept = _full_collections(), []
        for _ in range(20 * generations[0]):
            kept.append(_Cycle())
        young = weakref.ref(_Cycle())
        for _ in range(2 * generations[0]):
            kept.append(_Cycle())
        assert _full_collections() == before
        assert young() is None
        old = [weakref.ref(cycle) for cycle in kept]
        kept.clear()
        collect()
        assert all(cycle() is None for cycle in old)
    assert gc.get_threshold() == generations


def test_the_collector_is_as_before_after_an_error() -> None:
    """Thresholds and frozen objects are restored."""
    generations = gc.get_threshold()
    with pytest.raises(KeyError), collected_by_hand():
        raise KeyError
    assert gc.get_threshold() == generations
    assert gc.get_freeze_count() == 0


def _living() -> tuple[int, int]:
    """Return the number of tensors that Python knows, and their bytes; hold none of them."""
    sizes = [x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor]
    return len(sizes), sum(sizes)


def _steps(path: Path, count: int) -> dict[str, Any]:
    """Living tensors and their bytes after each of `count` updates, and full collections that nobody asked for."""
    with actor_of(path) as actor, collected_by_hand() as collect:
        asked, before, tensors = 0, _full_collections(), []
        for _ in range(count):
            update(actor, 0, 250)
            collect()
            asked += 1
            tensors.append(_living())
        return {"tensors": tensors, "unasked": _full_collections() - before - asked}


@pytest.mark.distributed
def test_memory_does_not_grow(tmp_path: Path) -> None:
    """The sixth step leaves as many tensors and bytes alive as the second, but for one scalar at most."""
    (found,) = run_ranks(_steps, 1, make_qwen2(tmp_path, layers=1, vocab=250), 6)
    assert found["unasked"] == 0
    counts, sizes = zip(*found["tensors"][1:], strict=True)
    assert max(counts) - min(counts) <= 1, found["tensors"]
    assert max(sizes) - min(sizes) <= 8, found["tensors"]
