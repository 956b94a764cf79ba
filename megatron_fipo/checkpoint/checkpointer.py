"""Saves and loads a run's checkpoints. All ranks take part; rank 0 decides, and all learn the outcome."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from megatron_fipo.actor import FIPOActor
from megatron_fipo.actor import checkpoint as actor_state
from megatron_fipo.checkpoint import files, retention, writing
from megatron_fipo.checkpoint.files import DamagedError, Marker
from megatron_fipo.checkpoint.staging import Staging
from megatron_fipo.checkpoint.writing import Payload, Report, WriterQueue, Written
from megatron_fipo.config import CheckpointConfig
from megatron_fipo.convert.distributed import load_sharded
from megatron_fipo.convert.untrusted import code_refused
from megatron_fipo.parallel.collectives import broadcast, gather, gather_to_first
from megatron_fipo.parallel.topology import Topology

_MOST_FAILURES = 2


@dataclass(frozen=True)
class Statistics:
    """Figures of a checkpoint that was written.

    Attributes:
        bytes: of all files.
        pause: seconds that training stood still in `save`, for an earlier one to end as well.
        writing: seconds that the slowest rank's writer took, in the background or within the pause.
    """

    step: int
    bytes: int
    pause: float
    writing: float


@dataclass
class _Save:
    """A checkpoint that is being written."""

    step: int
    score: float | None
    payload: Payload
    report: Report
    metadata: Metadata | None  # on rank 0
    failure: str | None = None
    bytes: int = 0  # on rank 0, once written
    pause: float = 0.0
    writing: float = 0.0  # on rank 0, once written


class Checkpointer:
    """Checkpoints of one actor in one directory, used by no other run. All methods but `close` are collective.

    Attributes:
        whole: step of the newest checkpoint that is known to be whole, saved, found or loaded by this process.
        last: figures of the checkpoint that was written last; whole only on rank 0.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        actor: FIPOActor,
        topology: Topology,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Nothing is touched yet. `warn` is called on rank 0."""
        self.directory = directory
        self.config = config
        self.actor = actor
        self.topology = topology
        self.last: Statistics | None = None
        self._warn = warn if topology.rank == 0 else lambda text: None
        self._queue = WriterQueue()
        self._staging = Staging()
        self._pending: _Save | None = None
        self._failures = 0  # saves in a row that failed in the background
        self._validated = False
        self.whole: int | None = None
        self._deletion: threading.Thread | None = None

    # Saving

    @property
    def in_progress(self) -> bool:
        """True while a checkpoint is being written."""
        return self._pending is not None

    def save(
        self, step: int, state: dict[str, Any], part: Any = None, score: float | None = None, wait: bool = False
    ) -> None:
        """Write `step_<step>`, after the end of a save that is in progress.

        Returns when everything is staged, so that training may go on; with `wait`, or without
        checkpoint.asynchronous, when the checkpoint is whole on disk.

        Args:
            state: numbers, texts, lists and dicts, the same on all ranks.
            part: what this data-parallel replica keeps for itself, of tensors, numbers, texts, lists, tuples and
                dicts; the first rank's of each replica is written.
            score: a validation score, for checkpoint.keep_best.

        Raises:
            OSError: with `wait`, it could not be written. Without, that is a warning and training goes on, unless the
                save before could not be written either.
            TypeError: `state` or `part` holds something else.
        """
        started = time.perf_counter()
        self._settle()
        small = self._small_files(state, part)
        if failure := self._on_first_rank(lambda: self._prepare(step)):
            self._fail(step, failure, wait)
            return
        self._pending = self._stage(step, score, small)
        if self.config.asynchronous and not wait:
            self._write_behind(self._pending)
            self._pause(started)
        else:
            self._request(self._pending, background=False).execute_sync()
            self._pause(started)
            self._conclude(wait)

    def poll(self) -> None:
        """Finalize a write that is done on all ranks; costs one small reduction while there is one, else nothing."""
        if self._pending is not None and self._queue.maybe_finalize_async_calls(blocking=False):
            self._conclude(wait=False)

    def finish(self) -> None:
        """Wait until the write in progress, if any, is whole on disk.

        Raises:
            OSError: it could not be written.
        """
        if self._pending is not None:
            self._queue.maybe_finalize_async_calls(blocking=True)
            self._conclude(wait=True)
        self._join_deletion()

    def close(self) -> None:
        """Give up a write in progress. Not collective.

        To be called when training ends, however it ends, after `finish` if it ends well.
        """
        self._queue.kill()
        self._pending = None
        self._staging.close()

    def _settle(self) -> None:
        """Bring an earlier write to its end; its failure is a warning."""
        if self._pending is not None:
            self._queue.maybe_finalize_async_calls(blocking=True)
            self._conclude(wait=False)

    def _prepare(self, step: int) -> None:
        retention.delete(files.leftovers(self.directory, "unfinished"))
        files.unfinished(self.directory, step).mkdir(parents=True)

    def _clean_up(self) -> None:
        retention.finish_interrupted(self.directory)
        retention.delete(files.leftovers(self.directory, "unfinished", "removed"))

    def _small_files(self, state: dict[str, Any], part: Any) -> dict[str, bytes]:
        """Write this rank's files, except Megatron's."""
        small = {}
        if self.topology.rank == 0:
            small[files.STATE] = json.dumps(state).encode()
            small[files.FORMAT] = json.dumps(asdict(CheckpointingConfig("torch_dist"))).encode()
        if self.topology.replica.rank() == 0:
            _check_plain(part)
            small[_part_name(self.topology.dp.rank())] = _saved(part)
        return small

    def _stage(self, step: int, score: float | None, small: dict[str, bytes]) -> _Save:
        # The validation exchanges every rank's shapes; they stay the same throughout a run.
        sharded, common = save_preprocess(
            actor_state.sharded_state(self.actor, loading=False), validate_access_integrity=not self._validated
        )
        self._validated = True
        planned, metadata = writing.plan(sharded, files.unfinished(self.directory, step))
        if self.topology.rank == 0:
            small[files.COMMON] = _saved(common)
        payload = Payload(f"__{self.topology.rank}_0.distcp", planned.items, small)
        return _Save(step, score, payload, Report(), metadata)

    def _request(self, save: _Save, background: bool) -> AsyncRequest:
        path = files.unfinished(self.directory, save.step)
        return writing.request(path, save.payload, save.report, self._staging, background, self._finalize)

    def _write_behind(self, save: _Save) -> None:
        failure = None
        try:
            self._queue.schedule_async_request(self._request(save, background=True))
        except OSError as error:  # no memory for another process
            failure = f"its writer cannot be started: {error.strerror}"
        if failure := _first(failure):
            self.close()
            self._fail(save.step, failure, wait=False)

    def _pause(self, started: float) -> None:
        if self._pending is not None:
            self._pending.pause = time.perf_counter() - started

    def _finalize(self) -> None:
        """Gather the writers' reports, and if all succeeded publish the checkpoint."""
        save = self._pending
        assert save is not None
        written = save.report.take()
        results = [] if written.error else written.results(save.payload)
        box = gather_to_first((written, results))
        errors = [f"{w.error} (rank {r})" for r, (w, _) in enumerate(box) if w.error]
        save.failure = self._on_first_rank(lambda: self._publish(save, box), errors[0] if errors else None)

    def _publish(self, save: _Save, box: list[tuple[Written, list[WriteResult]]]) -> None:
        path = files.unfinished(self.directory, save.step)
        records = {name: record for written, _ in box for name, record in written.files.items()}
        assert save.metadata is not None
        FileSystemWriter(path).finish(save.metadata, [results for _, results in box])
        files.flush(path / files.METADATA)  # torch asks for it with the end still in its own buffer
        records[files.METADATA] = files.record(path / files.METADATA)
        retention.publish(self.directory, Marker(save.step, self._layout(), save.score, records))
        save.bytes = sum(record.bytes for record in records.values())
        save.writing = max(written.seconds for written, _ in box)

    def _conclude(self, wait: bool) -> None:
        """After `_finalize`, on all ranks."""
        save, self._pending = self._pending, None
        assert save is not None
        self._staging.release()
        if save.failure:
            self._fail(save.step, save.failure, wait)
            return
        self.whole, self._failures = save.step, 0
        self.last = Statistics(save.step, save.bytes, save.pause, save.writing)
        if failure := self._on_first_rank(lambda: self._remove_old(save.step)):
            self._warn(f"old checkpoints in {self.directory} could not be removed: {failure}")

    def _remove_old(self, written: int) -> None:
        """Delete in the background, since deleting takes long on some file systems."""
        self._join_deletion()
        old = retention.retire(self.directory, self.config, written)
        self._deletion = threading.Thread(target=retention.delete, args=(old,), daemon=True)
        self._deletion.start()

    def _join_deletion(self) -> None:
        if self._deletion is not None:
            self._deletion.join()
            self._deletion = None

    def _fail(self, step: int, reason: str, wait: bool) -> None:
        self._on_first_rank(lambda: retention.delete([files.unfinished(self.directory, step)]))
        kept = (
            f"the one of step {self.whole} stays" if self.whole is not None else "there is no earlier one of this run"
        )
        text = f"the checkpoint of step {step} could not be written: {reason}; {kept}"
        self._failures += not wait
        if wait or self._failures >= _MOST_FAILURES:  # training without checkpoints would waste node-hours
            raise OSError(f"{text}. Make {self.directory} writable and free space there, then start the run again")
        self._warn(f"{text}. Training goes on: make sure that {self.directory} is writable and has space")

    def _on_first_rank(self, action: Callable[[], Any], failure: str | None = None) -> str | None:
        """Do it on rank 0, unless there is a `failure` already; what went wrong, on all ranks."""
        if self.topology.rank == 0 and failure is None:
            try:
                action()
            except OSError as error:
                failure = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        return broadcast(failure)

    # Loading

    def newest(self) -> int | None:
        """Return the step of the newest whole checkpoint, all files of which were read; None if there is none.

        Damaged ones are named in a warning and passed over.

        Raises:
            ValueError: there are checkpoints, but all are damaged.
        """
        self._on_first_rank(self._clean_up)
        reasons = []
        for step in broadcast(files.steps(self.directory) if self.topology.rank == 0 else None):
            reason = self._damage(step)
            if reason is None:
                self.whole = step
                return step
            reasons.append(f"{files.directory_of(self.directory, step)}: {reason}")
            self._warn(f"damaged checkpoint passed over: {reasons[-1]}")
        if reasons:
            raise ValueError(
                "no checkpoint of this run is whole; restore one, or start over with run.overwrite=true:\n"
                + "\n".join(f"  - {reason}" for reason in reasons)
            )
        return None

    def load(self, step: int) -> tuple[dict[str, Any], list[Any]]:
        """Restore the actor from `step_<step>`, saved by whatever layout.

        Returns the trainer's state, and the parts of all replicas that saved it, in their order.

        Raises:
            ValueError: there is no such checkpoint, it is damaged, or it is of another model.
        """
        path = files.directory_of(self.directory, step)
        if self.whole != step and (reason := self._damage(step)):
            raise ValueError(f"{path} cannot be loaded: {reason}")
        marker = Marker.read(path, step)
        wanted = actor_state.sharded_state(self.actor, loading=True)
        if marker.layout != self._layout():
            del wanted["random"]  # has no meaning for other ranks
        actor_state.restore(self.actor, load_sharded(wanted, path, optional=actor_state.OPTIONAL))
        self.whole = step
        replicas = range(marker.layout["data"])
        with code_refused(path):
            parts = [torch.load(path / _part_name(d), map_location="cpu", weights_only=True) for d in replicas]
        return json.loads((path / files.STATE).read_text()), parts

    def _damage(self, step: int) -> str | None:
        """Return why a checkpoint is damaged, checked by all ranks together; None if it is whole."""
        path = files.directory_of(self.directory, step)
        reason: str | None = None
        try:
            records = Marker.read(path, step).files
            for name in files.share(records, self.topology.rank, self.topology.world_size):
                reason = reason or files.damage(path, name, records[name])
        except DamagedError as error:
            reason = str(error)
        return _first(reason)

    def _layout(self) -> dict[str, int]:
        t = self.topology
        sizes = {"tensor": t.tp, "pipeline": t.pp, "context": t.cp, "data": t.dp, "expert": t.ep}
        return {
            "world": t.world_size,
            "virtual_pipeline": t.virtual_pipeline,
            **{name: group.size() for name, group in sizes.items()},
        }


def _part_name(replica: int) -> str:
    return f"replica_{replica}.pt"


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _check_plain(value: Any) -> None:
    """Only what `torch.load` reads back without unpickling code."""
    if isinstance(value, dict):
        for item in value.items():
            _check_plain(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_plain(item)
    elif value is not None and type(value) not in (bool, int, float, str, bytes, torch.Tensor):
        raise TypeError(f"a checkpoint's part cannot hold a {type(value).__name__}")


def _first(problem: str | None) -> str | None:
    """Return the problem of the lowest rank that has one, on all ranks."""
    return next((text for text in gather(problem) if text is not None), None)
