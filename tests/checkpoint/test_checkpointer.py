"""Saving in the background, which checkpoints stay, and what a checkpoint serves for."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_fipo.checkpoint import files, writing
from megatron_fipo.convert.conversion import to_huggingface
from tests.support.actors import actor_of, weights_of
from tests.support.checkpoint_runs import ASYNCHRONOUS, SYNCHRONOUS, TWO, differing, run_of, update, write_slowly
from tests.support.policies import make_qwen2
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

VOCAB = 250
LIMIT = 100_000  # bytes; a rank's data file is larger


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("hf"), layers=2, vocab=VOCAB)


# Background writes


def _write_when(allowed: Path) -> None:
    """Writers wait until this file is there."""
    original = writing._write_files

    def waiting(*args: Any) -> Any:
        while not allowed.exists():
            time.sleep(0.01)
        return original(*args)

    writing._write_files = waiting


def _save_behind_training(path: Path, directory: Path, allowed: Path) -> Any:
    _write_when(allowed)
    with run_of(path, directory) as run:
        update(run.actor, 0, VOCAB)
        saved = weights_of(run.actor)
        started = time.monotonic()
        run.checkpointer.save(1, {})
        pause = time.monotonic() - started
        visible = [files.steps(directory)]
        run.checkpointer.poll()
        visible.append(files.steps(directory))
        dist.barrier()
        for seed in (1, 2):
            update(run.actor, seed, VOCAB)
        allowed.touch()
        run.poll_to_the_end()
        visible.append(files.steps(directory))
        now = weights_of(run.actor)
        run.checkpointer.load(1)
        return saved, now, weights_of(run.actor), visible, pause, run.checkpointer.last, run.warnings


def test_training_goes_on_during_a_save(path: Path, tmp_path: Path) -> None:
    """Weights change while their earlier values are written; the checkpoint appears only when it is whole."""
    directory = tmp_path / "run"
    ranks = run_ranks(_save_behind_training, 2, path, directory, tmp_path / "allowed")
    saved, now, loaded, visible, _, last, warnings = ranks[0]
    assert differing(loaded, saved) == []
    assert differing(now, saved)
    assert visible == [[], [], [1]]
    assert 0 < last.pause <= max(rank[4] for rank in ranks)
    assert last.writing > 0
    assert last.bytes == sum(f.stat().st_size for f in (directory / "step_1").iterdir() if f.name != files.MARKER)
    assert warnings == []


def _save_twice_at_once(path: Path, directory: Path) -> Any:
    write_slowly(0.5)
    with run_of(path, directory) as run:
        run.checkpointer.save(1, {"n": 1})
        run.checkpointer.save(2, {"n": 2})
        steps = files.steps(directory)
        run.checkpointer.finish()
        return steps, files.steps(directory), run.checkpointer.load(1)[0], run.checkpointer.load(2)[0]


def test_a_second_save_waits_for_the_first(path: Path, tmp_path: Path) -> None:
    """Both checkpoints are whole in the end."""
    assert run_ranks(_save_twice_at_once, 2, path, tmp_path)[1] == ([1], [2, 1], {"n": 1}, {"n": 2})


def _save_both_ways(path: Path, directory: Path) -> Any:
    for name, config in (("a", ASYNCHRONOUS), ("s", SYNCHRONOUS)):
        with run_of(path, directory / name, config) as run:
            update(run.actor, 0, VOCAB)
            run.checkpointer.save(1, {"x": [1.5, None]}, part={"y": (torch.ones(2), "text")})
            run.checkpointer.finish()


def test_background_writes_the_same_files(path: Path, tmp_path: Path) -> None:
    """Asynchronous or not, the bytes of every data file are the same, and every rank wrote its share of them."""
    run_ranks(_save_both_ways, 2, path, tmp_path)
    markers = [files.Marker.read(tmp_path / name / "step_1", 1) for name in "as"]
    assert markers[0].files == {**markers[1].files, files.METADATA: markers[0].files[files.METADATA]}
    assert markers[0].layout["data"] == 2
    sizes = [markers[0].files[f"__{rank}_0.distcp"].bytes for rank in range(2)]
    assert max(sizes) < 1.2 * min(sizes)
    names = {"state.json", "common.pt", "metadata.json", ".metadata", "replica_0.pt", "replica_1.pt"}
    assert markers[0].files.keys() == names | {"__0_0.distcp", "__1_0.distcp"}


def _save_as_daemon(path: Path, directory: Path) -> Any:
    with run_of(path, directory, parallel={"world_size": 1}) as run:
        run.checkpointer.save(1, {})
        after = multiprocessing.current_process().daemon
        run.checkpointer.finish()
    return after


def test_daemonic_ranks_may_have_writers(path: Path, tmp_path: Path) -> None:
    """The ban on daemons' children is lifted for the writer alone."""
    assert run_ranks(_save_as_daemon, 1, path, tmp_path) == [True]


# What stays


def _save_steps(path: Path, directory: Path, config: Any, scores: dict[int, float | None]) -> Any:
    with run_of(path, directory, config, parallel={"world_size": 1}) as run:
        seen = []
        for step, score in scores.items():
            run.checkpointer.save(step, {}, score=score)
            run.checkpointer.finish()
            seen.append(sorted(os.listdir(directory)))
        return seen


def test_old_checkpoints_go(path: Path, tmp_path: Path) -> None:
    """After each save the last 1, the best and multiples of 4 are there, and nothing else is."""
    config = replace(ASYNCHRONOUS, keep_last=1, keep_every=4, keep_best=True)
    scores: dict[int, float | None] = {2: 0.5, 4: 0.1, 6: None, 8: 0.9, 9: 0.2}
    (tmp_path / ".step_1.unfinished").mkdir()
    (seen,) = run_ranks(_save_steps, 1, path, tmp_path, config, scores)
    expected = [[2], [2, 4], [2, 4, 6], [4, 8], [4, 8, 9]]
    assert seen == [[f"step_{step}" for step in steps] for steps in expected]


# What a checkpoint serves for


def _trained(path: Path, directory: Path) -> Any:
    with run_of(path, directory, parallel={"tensor": 2, "pipeline": 2, "world_size": 4}) as run:
        update(run.actor, 0, VOCAB)
        run.checkpointer.save(1, {})
        run.checkpointer.finish()
        return weights_of(run.actor)


def _started(path: Path, checkpoint: Path) -> Any:
    with actor_of(path, model={"megatron_path": str(checkpoint)}) as actor:
        return weights_of(actor), actor.optimizer.counters()["updates"]


def test_export_and_start_from_a_checkpoint(path: Path, tmp_path: Path) -> None:
    """`convert to-hf` writes its weights, and model.megatron_path starts a new run from them, bit for bit."""
    live = run_ranks(_trained, 4, path, tmp_path)[0]
    to_huggingface(tmp_path / "step_1", tmp_path / "hf", config=path)
    assert differing(load_file(tmp_path / "hf" / "model.safetensors"), live) == []
    weights, updates = run_ranks(_started, 1, path, tmp_path / "step_1")[0]
    assert differing(weights, live) == []
    assert updates == 0


def _draw() -> list[Any]:
    return [random.random(), random.gauss(0, 1), float(np.random.rand()), float(torch.rand(1))]  # noqa: NPY002


def _save_and_draw(path: Path, directory: Path) -> Any:
    with run_of(path, directory) as run:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(run.actor.topology.rank)
        _draw()
        run.checkpointer.save(1, {})
        expected = _draw()
        run.checkpointer.finish()
        return expected


def _load_and_draw(path: Path, directory: Path, sections: dict[str, Any]) -> Any:
    with run_of(path, directory, **sections) as run:
        _draw()
        run.checkpointer.load(1)
        return _draw()


def test_random_states_of_every_rank(path: Path, tmp_path: Path) -> None:
    """Python's, numpy's and torch's go on from where each rank's were, on the same layout; on another they stay."""
    expected = run_ranks(_save_and_draw, 2, path, tmp_path)
    assert expected[0] != expected[1]
    assert run_ranks(_load_and_draw, 2, path, tmp_path, TWO) == expected
    other = {"parallel": {"tensor": 2, "world_size": 2}}
    assert run_ranks(_load_and_draw, 2, path, tmp_path, other) != expected


KL = {"algorithm": {"kl_coefficient": 0.1}}


def _initial(path: Path, directory: Path, sections: dict[str, Any], save: bool) -> Any:
    with run_of(path, directory, **sections) as run:
        if save:
            for chunk in run.actor.chunks:
                for parameter in chunk.parameters():
                    parameter.data.mul_(1.5)
            run.checkpointer.save(1, {})
            run.checkpointer.finish()
        else:
            run.checkpointer.load(1)
        if run.actor.initial_weights is None:
            return None
        run.actor._put_weights(run.actor.initial_weights)
        return weights_of(run.actor)


def test_initial_weights_of_the_kl_penalty(path: Path, tmp_path: Path) -> None:
    """They are those that the run started from, not those that the resumed actor was made from."""
    other = make_qwen2(tmp_path / "other", layers=2, vocab=VOCAB, seed=1)
    expected = run_ranks(_initial, 2, path, tmp_path / "run", {"parallel": {"tensor": 2, "world_size": 2}, **KL}, True)[
        0
    ]
    loaded = run_ranks(_initial, 1, other, tmp_path / "run", {"parallel": {"world_size": 1}, **KL}, False)[0]
    assert differing(loaded, expected) == []
    without = run_ranks(_initial, 1, other, tmp_path / "run", {"parallel": {"world_size": 1}}, False)[0]
    assert without is None


def test_kl_penalty_that_a_checkpoint_knows_nothing_of(path: Path, tmp_path: Path) -> None:
    """Without initial weights in the checkpoint, the actor's own stay."""
    one: dict[str, Any] = {"parallel": {"world_size": 1}}
    run_ranks(_initial, 1, path, tmp_path / "run", one, True)
    kept = run_ranks(_initial, 1, path, tmp_path / "run", {**one, **KL}, False)[0]
    assert differing(kept, load_file(path / "model.safetensors")) == []


def _skip_and_offload(path: Path, directory: Path) -> Any:
    """Counters in the middle of a warm-up with a skipped update, and a state that is offloaded between updates."""
    adam = {"distributed": True, "offload_state": True, "warmup": 10, "warmup_unit": "update", "spike_threshold": 1e-9}
    with run_of(path, directory, parallel={"world_size": 2}, optimizer=adam) as run:
        update(run.actor, 0, VOCAB)
        run.actor.offload_adam_states()
        run.checkpointer.save(1, {}, wait=True)
        saved = run.actor.optimizer.counters(), run.actor.optimizer.lr
        run.actor.optimizer.set_counters({"updates": 7, "schedule": 9, "consecutive_skips": 0})
        run.checkpointer.load(1)
        run.actor.onload_adam_states()
        return saved, (run.actor.optimizer.counters(), run.actor.optimizer.lr)


def test_counters(path: Path, tmp_path: Path) -> None:
    """A skipped update advanced the schedule and the skips, not Adam: all three are restored, and the rate."""
    saved, loaded = run_ranks(_skip_and_offload, 2, path, tmp_path)[0]
    assert saved == ({"updates": 0, "schedule": 1, "consecutive_skips": 1}, 1e-4)
    assert loaded == saved


def _load_other_model(path: Path, directory: Path) -> Any:
    with run_of(path, directory, parallel={"world_size": 1}) as run, pytest.raises(ValueError, match="step_1") as error:
        run.checkpointer.load(1)
    return str(error.value)


@pytest.mark.parametrize(
    ("saved", "wanted", "reason"),
    [({}, {"layers": 3}, r"does not fit the model: .*shape"), ({"tied": True}, {}, r"lacks .*output_layer\.weight")],
)
def test_a_checkpoint_of_another_model(
    saved: dict[str, Any], wanted: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """Refused with the tensor that has another shape, or is not there."""
    paths = [
        make_qwen2(tmp_path / name, **{"layers": 2, "vocab": VOCAB, **changes})
        for name, changes in (("saved", saved), ("wanted", wanted))
    ]
    run_ranks(_initial, 1, paths[0], tmp_path / "run", {"parallel": {"world_size": 1}}, True)
    (error,) = run_ranks(_load_other_model, 1, paths[1], tmp_path / "run")
    assert re.search(reason, error, re.DOTALL), error


def _save_what_cannot_be_read(path: Path, directory: Path) -> Any:
    with run_of(path, directory, parallel={"world_size": 1}) as run:
        with pytest.raises(TypeError, match="cannot hold a set"):
            run.checkpointer.save(1, {}, part={"x": [torch.ones(1), {1}]})
        with pytest.raises(TypeError):
            run.checkpointer.save(1, {"x": torch.ones(1)})


def test_a_part_that_could_not_be_loaded_is_refused(path: Path, tmp_path: Path) -> None:
    """When it is saved, not when it is needed; nothing is written."""
    run_ranks(_save_what_cannot_be_read, 1, path, tmp_path)
    assert list(tmp_path.iterdir()) == []
