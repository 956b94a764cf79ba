"""When a rank searches all of its objects for unreachable cycles: once a step, on all ranks at the same point.

Python does so whenever enough objects have been made, which takes a third of a second with all modules imported, on one
rank in the midst of an update for which the others wait.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_NEVER = 1 << 30


@contextmanager
def collected_by_hand() -> Iterator[Callable[[], int]]:
    """Yield what searches everything made inside; Python itself goes on to search young objects only.

    What is there at the beginning, such as modules and the model, is not searched inside. Young objects are few, and
    among them is most of what becomes garbage.
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
