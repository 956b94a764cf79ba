"""What all tests share."""

import gc

import pytest
import torch
from hypothesis import settings

from tests import ranks

# Tests run beside each other's ranks on few cores, where a second thread costs more than it brings.
torch.set_num_threads(1)
# How long an example takes says nothing on a machine that does other things, too.
settings.register_profile("any speed", deadline=None)
settings.load_profile("any speed")


def pytest_collection_finish() -> None:
    """Spare later garbage collections the walk through everything that imports and collection have made."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start the server that ranks are forked from before `launch.run` could start one with fewer modules."""
    if item.get_closest_marker("distributed"):
        ranks.start_fork_server()
