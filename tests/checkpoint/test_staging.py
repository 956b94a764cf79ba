"""Host memory of a save: a copy that stays as it was until the save has ended, whatever is pinned meanwhile.

Without a GPU, tensors of the model are declared to lie on one, and pinned memory is emulated as torch keeps it: shared
with forked processes, and given to the next one who asks as soon as the tensor that held it is gone.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.checkpoint import Checkpointer, staging, writing
from megatron_fipo.checkpoint.staging import Staging
from megatron_fipo.parallel import pinned
from tests.support.actors import actor_of, weights_of
from tests.support.checkpoint_runs import ASYNCHRONOUS, differing, update
from tests.support.policies import make_qwen2
from tests.support.ranks import run_ranks
from tests.support.waiting import wait_until

VOCAB = 250


class _PinnedCache:
    """Blocks come back when nobody holds their tensor, and the smallest that is large enough is given out again."""

    def __init__(self, allocate: Callable[[int], torch.Tensor]) -> None:
        self._allocate = allocate
        self._free: list[torch.Tensor] = []

    def take(self, num_bytes: int) -> torch.Tensor:
        fitting = sorted((b for b in self._free if b.numel() >= num_bytes), key=torch.Tensor.numel)
        block = fitting[0] if fitting else self._allocate(num_bytes)
        self._free = [b for b in self._free if b is not block]
        given = block.view(-1)
        weakref.finalize(given, self._free.append, block)
        return given

    def overwrite_free(self) -> int:
        """Write to all free blocks, as other users of pinned memory do. Returns their number."""
        gc.collect()
        for block in self._free:
            block.fill_(255)
        return len(self._free)


class _Forgetful(Staging):
    """Holds its memory no longer than the copying takes, as the process does that has forked a writer."""

    def copy(self, tensors: Any) -> list[torch.Tensor]:
        copies = super().copy(tensors)
        self._block = pinned.PinnedBlock("GB for checkpoints")
        return copies


def _save_beside_pinning(path: Path, directory: Path, kind: type[Staging]) -> Any:
    """Save in the background, let others pin memory and training go on before the writer begins, and load."""
    cache = _PinnedCache(pinned.shared_memory)
    pinned.shared_memory = cache.take
    staging.must_be_copied = lambda tensor: tensor.dtype == torch.float32  # but for random states, all there is
    write = writing._write_files
    with actor_of(path) as actor:
        checkpointer = Checkpointer(directory, ASYNCHRONOUS, actor, actor.topology)
        checkpointer._staging = kind()
        saved, taken = [], []
        for step in (1, 2):
            update(actor, step, VOCAB)
            saved.append(weights_of(actor))
            begin = directory.parent / f"begin_{step}"
            writing._write_files = lambda *args, begin=begin: (wait_until(begin.exists), write(*args))[1]
            checkpointer.save(step, {})
            taken.append(cache.overwrite_free())
            update(actor, 10 + step, VOCAB)
            begin.touch()
            checkpointer.finish()
        loaded = []
        for step in (1, 2):
            checkpointer.load(step)
            loaded.append(weights_of(actor))
        checkpointer.close()
    return [differing(a, b) for a, b in zip(saved, loaded, strict=True)], taken


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("hf"), layers=2, vocab=VOCAB)


@pytest.mark.distributed
def test_staged_tensors_outlive_the_save(path: Path, tmp_path: Path) -> None:
    """Two saves in a row come back bit for bit although all free pinned memory was overwritten before they began."""
    ((differences, taken),) = run_ranks(_save_beside_pinning, 1, path, tmp_path / "checkpoints", Staging)
    assert differences == [[], []]
    assert taken == [0, 0]


@pytest.mark.distributed
def test_memory_that_is_given_back_early_is_overwritten(path: Path, tmp_path: Path) -> None:
    """The emulation finds it: memory that is not held for as long as the save loses what it held."""
    ((differences, taken),) = run_ranks(_save_beside_pinning, 1, path, tmp_path / "checkpoints", _Forgetful)
    assert all(differences)
    assert all(taken)


@pytest.fixture
def _all_on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "must_be_copied", lambda tensor: True)


TENSORS = [
    torch.arange(5000.0),
    torch.tensor(3.5),
    torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).bfloat16().T,
    torch.tensor([True, False, True]),
    torch.empty(0, 4),
]


@pytest.mark.usefixtures("_all_on_device")
def test_copies_are_the_tensors() -> None:
    """Any type, shape and stride, a scalar and an empty one too; later changes of the tensors do not show."""
    given = [tensor.clone() for tensor in TENSORS]
    copies = Staging().copy(given)
    for tensor in given:
        tensor.zero_()
    for copy, tensor in zip(copies, TENSORS, strict=True):
        assert copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)


@pytest.mark.usefixtures("_all_on_device")
def test_one_block_serves_all_saves() -> None:
    """The next save uses the same memory, a larger one gets more, and none does while it is needed."""
    memory = Staging()
    first = memory.copy(TENSORS)[0].data_ptr()
    with pytest.raises(RuntimeError, match="save in progress"):
        memory.copy(TENSORS)
    memory.release()
    assert memory.copy(TENSORS[:1])[0].data_ptr() == first
    memory.release()
    large = memory.copy([torch.ones(1_000_000)])[0]
    assert torch.equal(large, torch.ones(1_000_000))


def test_host_memory_stays_where_it_is() -> None:
    """Tensors that a forked process can read are not copied."""
    memory = Staging()
    assert all(a is b for a, b in zip(memory.copy(TENSORS), TENSORS, strict=True))


class _Runtime:
    """Fake of CUDA's functions that pin memory; `answer` is the error code of the next registration."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if self.answer == 0:
            self.pinned[address] = num_bytes
        return self.answer

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> _Runtime:
    fake = _Runtime(0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "check_error", lambda error: None)
    return fake


@pytest.mark.usefixtures("_all_on_device")
def test_memory_is_pinned_while_it_is_held(runtime: _Runtime) -> None:
    """The block is pinned once, a larger one in its place, and nothing stays pinned after the end."""
    memory = Staging()
    for count in (1000, 500, 100_000):
        (copy,) = memory.copy([torch.ones(count)])
        ((address, num_bytes),) = runtime.pinned.items()
        assert address == copy.data_ptr()
        assert num_bytes >= copy.nbytes
        memory.release()
    memory.close()
    assert runtime.pinned == {}


@pytest.mark.usefixtures("_all_on_device")
def test_memory_that_cannot_be_pinned(runtime: _Runtime) -> None:
    """The copies are right all the same, and the user learns that they are slow."""
    runtime.answer = 2
    memory = Staging()
    with pytest.warns(UserWarning, match=r"could not be pinned \(CUDA error 2\)"):
        (copy,) = memory.copy([torch.arange(10.0)])
    assert torch.equal(copy, torch.arange(10.0))
    memory.close()


def test_reused_memory_is_copied() -> None:
    """Tensors in pinned memory that others will write to, such as Adam's state between two steps, are copied."""
    block, memory = pinned.PinnedBlock("GB for tests"), Staging()
    (state,) = block.views([torch.empty(100)])
    state.fill_(1.0)
    copy, other = memory.copy([state, TENSORS[0]])
    state.zero_()
    assert torch.equal(copy, torch.ones(100))
    assert other is TENSORS[0]
