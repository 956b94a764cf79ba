"""State of a run: its progress, the position of its data, and the checkpoints from which it resumes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any, Protocol

import torch.distributed as dist

from megatron_fipo.actor import FIPOActor
from megatron_fipo.checkpoint import Checkpointer
from megatron_fipo.config import Config
from megatron_fipo.parallel.collectives import broadcast
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.resume import Progress, starts_over
from megatron_fipo.run_log import RunLog, clear


class DataPosition(Protocol):
    """Source of training batches that can resume at a saved position."""

    def state_dict(self) -> dict[str, Any]: ...

    def kept_rollouts(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], kept_rollouts: list[Any]) -> None: ...

    def drain(self) -> None: ...


class RunState:
    """Progress and checkpoints of a run on this rank. All methods are collective over all ranks.

    Attributes:
        progress: finished steps and evaluations.
        pause_seconds: time that the newest checkpoint took from training.
    """

    def __init__(
        self, config: Config, topology: Topology, actor: FIPOActor, batches: DataPosition, log: RunLog
    ) -> None:
        self.config = config
        self.topology = topology
        self.actor = actor
        self.log = log
        self.progress = Progress()
        self.pause_seconds = 0.0
        self._batches = batches
        self._saved: Progress | None = None  # progress that the newest checkpoint holds
        self.mark_position()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Read and write checkpoints inside."""
        self.checkpointer = Checkpointer(
            self.config.run_directory / "checkpoints", self.config.checkpoint, self.actor, self.topology, self.log.warn
        )
        try:
            yield
        finally:
            self.checkpointer.close()

    def restore(self, began: datetime, without_weights: bool) -> bool:
        """Resume from the newest whole checkpoint; return whether there is nothing left to do.

        Args:
            began: when the run began.
            without_weights: the actor has not read initial weights, since a checkpoint was to replace them.

        Raises:
            ValueError: all checkpoints are damaged, of other data, or were removed since the run was started.
        """
        directory = self.config.run_directory
        self.log.claim_directory()
        if starts_over(self.config):
            if self.topology.rank == 0:
                clear(directory)
            dist.barrier()
        self.log.keep_beginning(began)
        newest = self.checkpointer.newest()
        if newest is not None:
            complete = newest >= self.config.trainer.max_steps and (directory / "summary.json").exists()
            if broadcast(complete):  # nodes may see different things of a file that is new or gone
                self.log.note(f"{directory} is complete: {newest} steps; raise trainer.max_steps to continue")
                return True
            state, kept = self.checkpointer.load(newest)
            self.progress = self._saved = Progress.from_state_dict(state["progress"])
            self._restore_position(state["collector"], kept)
            self.log.note(f"resuming after step {newest} from {directory / 'checkpoints'}")
        elif without_weights:
            raise ValueError(f"the checkpoints in {directory / 'checkpoints'} were removed meanwhile: start again")
        elif (directory / "metrics.jsonl").exists():
            self.log.note("an earlier attempt ended before its first checkpoint: starting at the beginning")
        self.mark_position()
        self.log.open(self.progress.step, self.progress.seconds)
        return False

    def finish_step(self, metrics: dict[str, float]) -> None:
        """Count one more finished step, whose metrics are recorded once it is evaluated."""
        self.progress = replace(self.progress, step=self.progress.step + 1, unlogged=metrics)
        self.mark_position()

    def record(self, progress: Progress, scores: dict[str, float]) -> None:
        """Write the metrics of the step that was finished last, and a checkpoint where one is due.

        Args:
            progress: the run's, with the step's evaluation, if there was one.
            scores: metrics of that evaluation.
        """
        config = self.config
        if progress.unlogged is None:
            self.progress = progress
            return
        self.log.step(progress.step, {**progress.unlogged, **scores})
        is_best = config.checkpoint.keep_best and progress.best != self.progress.best
        self.progress = replace(progress, unlogged=None)
        self.checkpointer.poll()
        if self.is_last or is_best or is_due(progress.step, config.checkpoint.every):
            self.drain()
            best_on = config.checkpoint.best_on
            self.save(score=scores.get(f"eval/{best_on}/avg@k" if best_on else "eval/avg@k"))

    @property
    def is_last(self) -> bool:
        """True once the run's last step is finished."""
        return self.progress.step == self.config.trainer.max_steps

    def evaluation_is_due(self) -> bool:
        """Return whether the weights of the finished steps are to be evaluated now."""
        progress = self.progress
        is_new = progress.unlogged is not None
        return progress.before is None or (is_new and (self.is_last or is_due(progress.step, self.config.eval.every)))

    def drain(self) -> None:
        """Finish the batch that is being sampled ahead, if any.

        The engine may then get other weights, and a checkpoint holds the batch.
        """
        self._batches.drain()
        self.mark_position()

    def mark_position(self) -> None:
        """Take the position of the data, and the responses that this replica keeps, for the next checkpoint."""
        self._position = self._batches.state_dict(), self._batches.kept_rollouts()

    def save(self, score: float | None = None, wait: bool = False) -> None:
        """Write a checkpoint of the last finished step, unless there is one or it is being written.

        Args:
            score: its validation score, by which the best checkpoint is kept.
            wait: return when it is whole.
        """
        started = time.monotonic()
        writer = self.checkpointer
        if self._saved != self.progress or not (writer.in_progress or writer.whole == self.progress.step):
            progress = replace(self.progress, seconds=self.log.seconds)
            position, kept = self._position
            state = {"progress": progress.state_dict(), "collector": position}
            writer.save(progress.step, state, kept, score, wait)
            self._saved = self.progress
        elif wait:
            writer.finish()
        self.pause_seconds = time.monotonic() - started

    def _restore_position(self, state: dict[str, Any], kept: list[Any]) -> None:
        try:
            self._batches.load_state_dict(state, kept)
        except ValueError as error:
            if not self.config.resume.allow_changes:
                raise
            self.log.warn(f"{error}; as resume.allow_changes is set, the new data starts at its beginning")


def is_due(step: int, every: int) -> bool:
    """Return whether something is due after `step` that happens every so many steps (0: never)."""
    return bool(every) and step % every == 0
