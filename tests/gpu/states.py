"""Checkpoints and optimizer states of a small policy on the device that there is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_fipo.actor import FIPOActor
from megatron_fipo.checkpoint import Checkpointer, writing
from megatron_fipo.config import CheckpointConfig
from tests.support.actors import actor_of, weights_of
from tests.support.checkpoint_runs import update

VOCAB = 250
SYNCHRONOUS = CheckpointConfig(asynchronous=False, keep_last=100)
Sections = dict[str, dict[str, Any]]


def everything(actor: FIPOActor) -> dict[str, torch.Tensor]:
    """Return copies of weights and Adam's state on the CPU."""
    found = {f"weight {name}": tensor for name, tensor in weights_of(actor).items()}
    for number, state in enumerate(actor.optimizer.parameter_states()):
        found |= {f"{name} {number}": tensor for name, tensor in state.moments.items()}
        found[f"main {number}"] = state.main
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in found.items()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that are not the same bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def save_beside(path: Path, directory: Path, disturb: Callable[[], object], sections: Sections) -> list[str]:
    """Save in the background, with `disturb` and an update between staging and writing.

    Returns the names of what came back changed.
    """
    begin, write = directory.with_suffix(".begin"), writing._write_files

    def late(*args: Any) -> Any:
        deadline = time.monotonic() + 60
        while not begin.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        return write(*args)

    writing._write_files = late
    try:
        with actor_of(path, **sections) as actor:
            checkpointer = Checkpointer(directory, replace(SYNCHRONOUS, asynchronous=True), actor, actor.topology)
            update(actor, 0, VOCAB)
            saved = everything(actor)
            checkpointer.save(1, {})
            disturb()
            update(actor, 1, VOCAB)
            changed = differing(saved, everything(actor))
            assert changed
            begin.touch()
            checkpointer.finish()
            checkpointer.load(1)
            checkpointer.close()
            return differing(saved, everything(actor))
    finally:
        writing._write_files = write


def save_both_ways(path: Path, directory: Path, sections: Sections) -> None:
    """Save the same state to `asynchronous/step_1` and `synchronous/step_1`."""
    with actor_of(path, **sections) as actor:
        update(actor, 0, VOCAB)
        for name, asynchronous in (("asynchronous", True), ("synchronous", False)):
            config = replace(SYNCHRONOUS, asynchronous=asynchronous)
            checkpointer = Checkpointer(directory / name, config, actor, actor.topology)
            checkpointer.save(1, {})
            checkpointer.finish()
            checkpointer.close()


def continued(path: Path, directory: Path, sections: Sections) -> list[str]:
    """Train three updates without and with a resumption before the third. Returns what differs at the end."""
    with actor_of(path, **sections) as actor:
        for seed in range(2):
            update(actor, seed, VOCAB)
        checkpointer = Checkpointer(directory, SYNCHRONOUS, actor, actor.topology)
        checkpointer.save(2, {}, wait=True)
        update(actor, 2, VOCAB)
        expected = everything(actor)
        checkpointer.close()
    with actor_of(path, **sections) as actor:
        Checkpointer(directory, SYNCHRONOUS, actor, actor.topology).load(2)
        update(actor, 2, VOCAB)
        return differing(expected, everything(actor))


def load_and_save(path: Path, source: Path, target: Path, sections: Sections) -> None:
    """Load `source/step_1` and write what was loaded to `target/step_1`, with the tensors in `target/tensors.pt`."""
    with actor_of(path, **sections) as actor:
        Checkpointer(source, SYNCHRONOUS, actor, actor.topology).load(1)
        checkpointer = Checkpointer(target, SYNCHRONOUS, actor, actor.topology)
        checkpointer.save(1, {}, wait=True)
        checkpointer.close()
        torch.save(everything(actor), target / "tensors.pt")


def offload_and_restore(path: Path, sections: Sections) -> dict[str, Any]:
    """Move Adam's state to host memory and back. Returns what changed, bytes on the GPU before, between and after, and
    the devices of the counts of updates."""

    def allocated() -> int:
        return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0

    with actor_of(path, **sections) as actor:
        update(actor, 0, VOCAB)
        actor.onload_adam_states()
        before, sizes = everything(actor), [allocated()]
        actor.offload_adam_states()
        sizes.append(allocated())
        actor.onload_adam_states()
        sizes.append(allocated())
        steps = {
            state["step"].device.type
            for part in actor.optimizer._parts()
            for state in part.optimizer.state.values()
            if isinstance(state.get("step"), torch.Tensor)
        }
        state_bytes = sum(s.main.nbytes * 3 for s in actor.optimizer.parameter_states())
        after = everything(actor)
        update(actor, 1, VOCAB)
        trained = differing(after, everything(actor))
    return {
        "differing": differing(before, after),
        "sizes": sizes,
        "state_bytes": state_bytes,
        "steps": steps,
        "trained": trained,
    }
