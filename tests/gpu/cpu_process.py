"""Run in a process that sees no GPU: load a checkpoint that a GPU wrote, and write it again for the GPU to load.

CUDA_VISIBLE_DEVICES= python -m tests.gpu.cpu_process MODEL SOURCE TARGET SECTIONS-AS-JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.gpu.states import load_and_save
from tests.gpu.world import GPUS, one_rank

if __name__ == "__main__":
    assert GPUS == 0, "this process was to see no GPU"
    model, source, target = (Path(text) for text in sys.argv[1:4])
    target.mkdir(parents=True)
    with one_rank():
        load_and_save(model, source, target, json.loads(sys.argv[4]))
