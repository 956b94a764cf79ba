"""Garbage collection once per step, on all ranks at the same point.

Python's automatic collection takes a third of a second with all modules imported, on one rank in the middle of an
update, while the others wait.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_NEVER = 1 << 30


@contextmanager
def collected_by_hand() -> Iterator[Callable[[], int]]:
    """Yield a function that collects garbage created inside; automatic collection is limited to young objects.

    Objects that exist at the start, such as modules and the model, are not scanned inside. Young objects are few and
    include most garbage.
    """
    gc.collect()
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(*before[:2], _NEVER)
    try:
        yield gc.collect
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
