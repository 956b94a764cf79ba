"""A checkpoint of a small mixture of experts in bfloat16, on two ranks that share its experts out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.checkpoint_runs import ASYNCHRONOUS, Sections, load_and_train, train_and_save
from tests.support.ranks import run_ranks

VOCAB = 149
SECTIONS: Sections = {
    "parallel": {"expert": 2, "world_size": 2},
    "optimizer": {"lr": 5e-3, "distributed": True},
    "model": {"dtype": "bfloat16"},
}


def save(hf: Path, directory: Path) -> dict[str, Any]:
    """Train, write a checkpoint, and return what was in it."""
    saved: dict[str, Any] = run_ranks(train_and_save, 2, hf, directory, SECTIONS, VOCAB, ASYNCHRONOUS)[0]
    return saved


def load(hf: Path, directory: Path) -> dict[str, Any]:
    """Return what was loaded."""
    loaded: dict[str, Any] = run_ranks(load_and_train, 2, hf, directory, SECTIONS, VOCAB)[0]
    return loaded
