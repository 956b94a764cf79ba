"""Room for the checkpoints that a run will write, before it starts."""

from __future__ import annotations

from megatron_fipo.config import Config
from megatron_fipo.machine.space import room
from megatron_fipo.scaling.flops import parameters
from megatron_fipo.scaling.recipe import model_of

_STATE_BYTES = 12  # a parameter's float32 master weight and two moments of Adam
_GB = 1e9


def check_space(config: Config) -> list[str]:
    """Return warnings of room that will not suffice to the end of the run.

    Raises:
        ValueError: it does not suffice for a checkpoint beside the one that the next replaces.
    """
    size = checkpoint_bytes(config)
    written = sum(f.stat().st_size for f in (config.run_directory / "checkpoints").rglob("*") if f.is_file())
    most = num_checkpoints(config)
    free, limit = room(config.run_directory)
    needed = (
        f"a checkpoint takes {size / _GB:.1f} GB, and {config.run_directory} has {free / _GB:.1f} GB left by {limit}"
    )
    if free + written < size * min(most, 2):
        raise ValueError(f"{needed}: too little for one and its successor; make room, or choose another run.directory")
    if free + written < size * most:
        return [
            f"{needed}; checkpoint.keep_last, keep_best and keep_every will keep up to {most - 1}, and one more while "
            "it is written"
        ]
    return []


def checkpoint_bytes(config: Config) -> int:
    """Return the size of a checkpoint: 14 bytes a parameter in bfloat16."""
    bytes_a_weight = 2 if config.model.dtype == "bfloat16" else 0  # float32 weights are their own master weights
    return parameters(model_of(config)) * (_STATE_BYTES + bytes_a_weight)


def num_checkpoints(config: Config) -> int:
    """Return how many checkpoints are there at the most: those that stay, and one that is being written."""
    c, steps = config.checkpoint, config.trainer.max_steps
    best = 1 if c.keep_best and config.data.benchmarks else 0
    for_good = steps // c.keep_every if c.keep_every else 0
    written = 1 + (steps // c.every if c.every else 1)
    return min(c.keep_last + best + for_good, written) + 1
