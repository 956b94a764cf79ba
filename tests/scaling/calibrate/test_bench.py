"""Timing on a GPU, whose events are emulated: whether launches that were to be queued waited for the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.scaling.calibrate import bench
from megatron_fipo.scaling.calibrate.bench import Bench


class _Device:
    """Sleeps until somebody waits for it; an event is over when the device is awake."""

    asleep = False


class _Event:
    def __init__(self, **_: object) -> None:
        pass

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return not _Device.asleep

    def synchronize(self) -> None:
        _Device.asleep = False

    def elapsed_time(self, end: _Event) -> float:
        return 5.0  # ms


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: setattr(_Device, "asleep", True), raising=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    timer = Bench(torch.device("cpu"))
    monkeypatch.setattr(timer, "_sample", timer._device_sample)
    yield timer
    dist.destroy_process_group()


def _launches() -> None:
    pass


def _waits() -> None:
    _Device.asleep = False


def test_queued_launches(emulated: Bench) -> None:
    """The time is the device's."""
    timing = emulated.time(_launches, budget=0.01, queued=True)
    assert timing == bench.Timing(0.005, 0.0, timing.samples, waited=False)


def test_launches_that_wait_for_the_device(emulated: Bench) -> None:
    """The time is the host's, and the result says so; nothing is said where no queue was asked for."""
    assert emulated.time(_waits, budget=0.01, queued=True).waited
    assert not emulated.time(_waits, budget=0.01, queued=False).waited
