"""Modules that ranks need, imported once in the server that ranks are forked from, or at a spawned rank's start.

Python's garbage collector is off meanwhile: nothing that imports make is garbage, and looking for some would take a
fifth of their time. What they made stays exempt from collections, which would write to pages that forked processes
share.
"""

import gc

_enabled = gc.isenabled()
gc.disable()

import megatron_fipo.trainer  # noqa: E402, F401
from megatron_fipo.launch.rank import main as rank_main  # noqa: E402, F401

gc.freeze()
if _enabled:
    gc.enable()
