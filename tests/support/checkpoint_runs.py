"""Work of this directory's tests inside ranks: train a little, save, load, and look at everything an actor has."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_fipo.actor import FIPOActor
from megatron_fipo.actor.optimizer import ParameterState
from megatron_fipo.checkpoint import Checkpointer, writing
from megatron_fipo.config import CheckpointConfig
from megatron_fipo.convert.export import export_weights
from tests.support.actors import actor_of, batch_of, weights_of
from tests.support.policies import make_rollouts

Tensors = dict[str, torch.Tensor]
Sections = dict[str, dict[str, Any]]
SYNCHRONOUS = CheckpointConfig(asynchronous=False, keep_last=100)
ASYNCHRONOUS = replace(SYNCHRONOUS, asynchronous=True)
TWO: Sections = {"parallel": {"world_size": 2}, "optimizer": {"distributed": True}}


def update(actor: FIPOActor, seed: int, vocab: int) -> None:
    """One step of one update, on responses that depend on `seed` alone."""
    batch = batch_of(actor, make_rollouts(6, vocab=vocab, seed=seed))
    old = [values - 0.1 for values in actor.log_probs(batch)]
    with actor.training(), actor.training_step():
        actor.get_loss_and_metrics(batch.with_token_values(old_log_probs=old), forward_only=False)


def contents(actor: FIPOActor) -> dict[str, Any]:
    """Everything that a checkpoint has to bring back, as whole tensors under their Hugging Face names."""
    states = {id(state.parameter): state for state in actor.optimizer.parameter_states()}
    return {
        "weights": weights_of(actor),
        "main": _whole(actor, states, lambda state: state.main),
        "exp_avg": _whole(actor, states, lambda state: state.moments["exp_avg"]),
        "exp_avg_sq": _whole(actor, states, lambda state: state.moments["exp_avg_sq"]),
        "counters": actor.optimizer.counters(),
        "lr": actor.optimizer.lr,
    }


def _whole(actor: FIPOActor, states: dict[int, ParameterState], part: Callable[[ParameterState], torch.Tensor]) -> Any:
    """Put together what data-parallel ranks have of each parameter."""

    def gathered(parameter: torch.nn.Parameter) -> torch.Tensor:
        whole = torch.zeros(parameter.numel())
        if state := states.get(id(parameter)):
            values = part(state).view(-1)
            whole[state.start : state.start + values.numel()] = values
        if actor.config.optimizer.distributed:
            expert = not getattr(parameter, "allreduce", True)
            dist.all_reduce(whole, group=actor.topology.groups.expt_dp if expert else actor.topology.dp_cp)
        return whole.view(parameter.shape)

    return {n: t.clone() for n, t in export_weights(actor.chunks, actor.arch, actor.topology, gathered)}


def train_and_save(path: Path, directory: Path, sections: Sections, vocab: int, config: CheckpointConfig) -> Any:
    """Two updates, a checkpoint, and another update: what the actor had when it saved, and its weights at the end."""
    with actor_of(path, **sections) as actor:
        for seed in range(2):
            update(actor, seed, vocab)
        saved = contents(actor)
        checkpointer = Checkpointer(directory, config, actor, actor.topology)
        checkpointer.save(2, {"step": 2}, part={"replica": actor.topology.dp.rank()})
        update(actor, 2, vocab)
        checkpointer.finish()
        checkpointer.close()
        return {**saved, "next": weights_of(actor)}


def load_and_train(path: Path, directory: Path, sections: Sections, vocab: int) -> Any:
    """The same of an actor with other weights that loads the newest checkpoint."""
    with actor_of(path, **sections) as actor:
        for chunk in actor.chunks:
            for parameter in chunk.parameters():
                parameter.data.mul_(1.5)
        checkpointer = Checkpointer(directory, SYNCHRONOUS, actor, actor.topology)
        step = checkpointer.newest()
        assert step == 2
        state, parts = checkpointer.load(step)
        loaded = {**contents(actor), "state": state, "parts": parts}
        update(actor, 2, vocab)
        return {**loaded, "next": weights_of(actor)}


def differing(a: Tensors, b: Tensors) -> list[str]:
    """Names of tensors that are not equal bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in b if not torch.equal(a[name], b[name])]


class CheckpointedActor:
    """An actor, its checkpointer and what that warned of."""

    def __init__(self, actor: FIPOActor, directory: Path, config: Any = ASYNCHRONOUS) -> None:
        self.actor = actor
        self.warnings: list[str] = []
        self.checkpointer = Checkpointer(directory, config, actor, actor.topology, self.warnings.append)

    def poll_to_the_end(self) -> int:
        """Poll until the write ends, as training does once a step; return the number of polls."""
        for count in range(1, 1000):
            self.checkpointer.poll()
            if not self.checkpointer.in_progress:
                return count
            time.sleep(0.02)
        raise AssertionError("the write does not end")


@contextlib.contextmanager
def run_of(path: Path, directory: Path, config: Any = ASYNCHRONOUS, **sections: Any) -> Iterator[CheckpointedActor]:
    with actor_of(path, **(sections or TWO)) as actor:
        run = CheckpointedActor(actor, directory, config)
        try:
            yield run
        finally:
            run.checkpointer.close()


def write_slowly(seconds: float) -> None:
    """Delay this rank's writers."""
    original = writing._write_files

    def slow(*args: Any) -> Any:
        time.sleep(seconds)
        return original(*args)

    writing._write_files = slow
