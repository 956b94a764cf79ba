"""The part of `test_checkpoints` in the environment that has the other release of Megatron-Core.

python -m tests.megatron.other_release HF SAVED WRITTEN RESULT: load the checkpoint that is in SAVED, write one into
WRITTEN, and put what was loaded and written into RESULT.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.megatron.one_checkpoint import load, save

if __name__ == "__main__":
    hf, saved, written, result = map(Path, sys.argv[1:])
    torch.save({"loaded": load(hf, saved), "written": save(hf, written)}, result)
