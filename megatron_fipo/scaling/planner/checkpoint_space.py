"""Disk space check for a run's checkpoints, before it starts."""

from __future__ import annotations

from megatron_fipo.config import Config
from megatron_fipo.machine.space import room
from megatron_fipo.scaling.cost.flops import parameters
from megatron_fipo.scaling.planner.run_inputs import model_of

_STATE_BYTES = 12  # per parameter: float32 master weight and two Adam moments
_GB = 1e9


def check_space(config: Config) -> list[str]:
    """Return warnings if the space will not suffice for the whole run.

    Raises:
        ValueError: it does not suffice for two checkpoints, the existing one and its replacement.
    """
    size = checkpoint_bytes(config)
    written = sum(f.stat().st_size for f in (config.run_directory / "checkpoints").rglob("*") if f.is_file())
    most = num_checkpoints(config)
    free, limit = room(config.run_directory)
    needed = (
        f"a checkpoint takes {size / _GB:.1f} GB, but {config.run_directory} has {free / _GB:.1f} GB left by {limit}"
    )
    if free + written < size * min(most, 2):
        raise ValueError(f"{needed}: at least two checkpoints must fit; free space, or choose another run.directory")
    if free + written < size * most:
        return [
            f"{needed}; checkpoint.keep_last, keep_best and keep_every keep up to {most - 1} checkpoints, "
            "plus one while it is written"
        ]
    return []


def checkpoint_bytes(config: Config) -> int:
    """Return the size of a checkpoint: 14 bytes per parameter in bfloat16."""
    bytes_a_weight = 2 if config.model.dtype == "bfloat16" else 0  # float32 weights are their own master weights
    return parameters(model_of(config)) * (_STATE_BYTES + bytes_a_weight)


def num_checkpoints(config: Config) -> int:
    """Return the maximum number of checkpoints: those kept, and one being written."""
    c, steps = config.checkpoint, config.trainer.max_steps
    best = 1 if c.keep_best and config.data.benchmarks else 0
    for_good = steps // c.keep_every if c.keep_every else 0
    written = 1 + (steps // c.every if c.every else 1)
    return min(c.keep_last + best + for_good, written) + 1
