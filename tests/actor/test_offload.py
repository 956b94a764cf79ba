"""Adam's state goes to one block of host memory and back bit for bit, and copies are ordered behind what they need.

Without a GPU, all that is not in the block counts as being on one.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_fipo.actor import offload
from megatron_fipo.actor.offload import HostState, Slot
from megatron_fipo.parallel import cpu_backend
from tests.gpu.states import differing, everything
from tests.support.actors import actor_of
from tests.support.checkpoint_runs import update
from tests.support.policies import make_qwen2
from tests.support.ranks import run_ranks

VOCAB = 250


class _Streams:
    """Stands for CUDA's streams: records what is queued, and the copies."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def make(self, name: str) -> Any:
        def note(text: str) -> Any:
            self.log.append(f"{name} {text}")
            return SimpleNamespace(name=f"event of {name}")

        return SimpleNamespace(
            name=name,
            wait_stream=lambda other: note(f"waits for {other.name}"),
            wait_event=lambda event: note(f"waits for {event.name}"),
            record_event=lambda: note("records"),
            synchronize=lambda: note("ends"),
        )


class _Inside:
    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> _Streams:
    cpu_backend.install()
    fake = _Streams()
    current, copies, copy = fake.make("current"), fake.make("copies"), torch.Tensor.copy_

    def logged(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        fake.log.append(f"copy {'queued' if non_blocking else 'waited for'}")
        return copy(self, source)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: copies)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", _Inside)
    monkeypatch.setattr(torch.Tensor, "copy_", logged)
    return fake


def _host(monkeypatch: pytest.MonkeyPatch) -> HostState:
    host = HostState(torch.device("cpu"))
    monkeypatch.setattr(offload, "is_on_device", lambda x: x.numel() > 0 and not host._block.holds(x))
    return host


def _slots(state: dict[str, torch.Tensor]) -> list[Slot]:
    def slot(name: str) -> Slot:
        return Slot(lambda: state[name], lambda tensor: state.__setitem__(name, tensor))

    return [slot(name) for name in state]


def _state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"main": (1000,), "moment": (7, 3), "narrow": (1025,), "one": (1,), "none": (0,)}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**state, "narrow": state["narrow"].bfloat16()}


def test_state_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits, types and shapes of every tensor, in host memory and after it, in new memory of the device."""
    cpu_backend.install()
    host, state = _host(monkeypatch), _state()
    expected = {name: tensor.clone() for name, tensor in state.items()}
    for _ in range(2):
        host.offload(_slots(state))
        away = dict(state)
        assert all(host._block.holds(tensor) for tensor in state.values() if tensor.numel())
        assert differing(expected, state) == []
        host.restore(_slots(state))
        assert not any(host._block.holds(tensor) for tensor in state.values())
        for tensor in away.values():
            tensor.zero_()
        assert differing(expected, state) == []
        assert [t.dtype for t in state.values()] == [t.dtype for t in expected.values()]
        expected["main"] = state["main"] = state["main"] + 1


def test_the_block_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the same place, without overlaps, and it only grows where there is more state."""
    cpu_backend.install()
    host, state = _host(monkeypatch), _state()
    places = []
    for _ in range(3):
        host.offload(_slots(state))
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in state.values() if t.numel())
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        places.append(spans)
        host.restore(_slots(state))
    assert places[0] == places[1] == places[2]
    size = host._block._memory.numel()
    host.offload(_slots({"small": torch.ones(3)}))
    assert host._block._memory.numel() == size


def test_offloading_twice_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second offload finds nothing to move; one of a part, beside state that is away, is refused."""
    cpu_backend.install()
    host, state = _host(monkeypatch), _state()
    host.offload(_slots(state))
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in state.items()}
    host.offload(_slots(state))
    assert all(state[n].data_ptr() == place and torch.equal(state[n], t) for n, (place, t) in before.items())
    state["main"] = torch.ones(1000)
    with pytest.raises(RuntimeError, match="only a part of the optimizer's state was restored"):
        host.offload(_slots(state))


def test_copies_are_ordered(streams: _Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies follow what was queued before; an offload ends when they have; a restore is waited for by the device
    alone, and by the next offload before the block is written to again."""
    host, state = _host(monkeypatch), {"a": torch.ones(5), "b": torch.ones(3)}
    host.offload(_slots(state))
    copies = ["copy queued"] * 2
    assert streams.log == ["copies waits for current", *copies, "copies ends"]
    streams.log.clear()
    host.restore(_slots(state))
    assert streams.log == ["copies waits for current", *copies, "copies records"]
    streams.log.clear()
    host.offload(_slots(state))
    assert streams.log[:2] == ["current waits for event of copies", "copies waits for current"]
    streams.log.clear()
    host.restore(_slots(state))
    host.wait()
    host.wait()
    assert streams.log[-1] == "current waits for event of copies"
    assert streams.log.count("current waits for event of copies") == 1


def _trained(path: Path, model: dict[str, Any], moved: bool) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Weights and state after three updates with offloads between them, and what lay in the block then."""
    away: set[str] = set()
    with actor_of(path, model=model, optimizer={"distributed": True}) as actor:
        optimizer = actor.optimizer
        block = optimizer._host._block
        if moved:
            optimizer.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
            offload.is_on_device = lambda tensor: not block.holds(tensor)
        for seed in range(3):
            update(actor, seed, VOCAB)
            actor.offload_adam_states()
            for state in optimizer.parameter_states():
                tensors = {"main": state.main, **state.moments}
                away |= {name for name, tensor in tensors.items() if block.holds(tensor)}
            actor.onload_adam_states()
        return everything(actor), away


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("dtype", "away"), [("bfloat16", {"main", "exp_avg", "exp_avg_sq"}), ("float32", {"exp_avg", "exp_avg_sq"})]
)
def test_training_goes_on(dtype: str, away: set[str], tmp_path: Path) -> None:
    """Three updates with the state away between them are those without; parameters that are the model's own stay."""
    path = make_qwen2(tmp_path, layers=1, vocab=VOCAB)
    ((expected, stayed),) = run_ranks(_trained, 1, path, {"dtype": dtype}, False)
    ((found, moved),) = run_ranks(_trained, 1, path, {"dtype": dtype}, True)
    assert differing(expected, found) == []
    assert (stayed, moved) == (set(), away)
