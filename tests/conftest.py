"""Fixtures and hooks of all tests."""

import gc

import pytest
import torch
from hypothesis import settings

from tests.support import ranks

# Tests run beside each other's ranks on few cores, where a second thread costs more than it brings.
torch.set_num_threads(1)
# How long an example takes says nothing on a machine that does other things, too. The same code gets the same examples
# each time: a fault shows where it was made, never in a later change. `--hypothesis-profile=search` finds new ones.
settings.register_profile("same examples", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None)
settings.load_profile("same examples")


def pytest_collection_finish() -> None:
    """Spare later garbage collections the walk through everything that imports and collection have made."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start the server that ranks are forked from before `launch.run` could start one with fewer modules."""
    if item.get_closest_marker("distributed"):
        ranks.start_fork_server()
