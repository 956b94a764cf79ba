"""How a process sets up its device, and that ranks do."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_fipo import launch
from megatron_fipo.config import ParallelConfig
from megatron_fipo.launch import DETERMINISTIC_ENVIRONMENT, start
from megatron_fipo.parallel import device


@pytest.fixture(autouse=True)
def _settings_restored() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.backends.cuda.enable_cudnn_sdp(before[0])
    torch.use_deterministic_algorithms(before[1])


@pytest.mark.parametrize("deterministic", [False, True])
def test_set_up(deterministic: bool) -> None:
    """cuDNN's attention is off; torch's deterministic algorithms are as asked for."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    device.set_up(None, deterministic)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.are_deterministic_algorithms_enabled() == deterministic


def test_nondeterministic_allowed() -> None:
    """Inside nothing raises for want of a deterministic form; afterwards all is as before, also after an error."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    seen = []

    def fail() -> None:
        with device.nondeterministic_allowed():
            seen.append(torch.are_deterministic_algorithms_enabled())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [False]
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()


@pytest.mark.parametrize(("asked", "threads"), [(None, 1), ("4", 4)])
def test_compiling_starts_no_processes(asked: str | None, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether torch's compiler was imported before or comes later; what the environment says goes first."""
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", asked or "")  # restored afterwards
    if asked is None:
        del os.environ["TORCHINDUCTOR_COMPILE_THREADS"]
    settings = SimpleNamespace(compile_threads=32)
    monkeypatch.setitem(sys.modules, "torch._inductor.config", settings)
    device.compile_in_this_process()
    assert settings.compile_threads == threads
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == str(threads)
    monkeypatch.delitem(sys.modules, "torch._inductor.config")
    device.compile_in_this_process()
    assert os.environ["TORCHINDUCTOR_COMPILE_THREADS"] == str(threads)


def _record(out: str) -> None:
    settings = {name: os.environ.get(name) for name in DETERMINISTIC_ENVIRONMENT}
    settings |= {"cudnn": torch.backends.cuda.cudnn_sdp_enabled()}
    settings |= {"algorithms": torch.are_deterministic_algorithms_enabled()}
    Path(out).write_text(json.dumps(settings))


@pytest.mark.distributed
@pytest.mark.parametrize("deterministic", [False, True])
def test_ranks_are_set_up(deterministic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank finds the environment that run.deterministic needs, or the user's own, and its device set up."""
    for name in DETERMINISTIC_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "settings.json"
    launch.run(_record, ParallelConfig(), (str(out),), deterministic=deterministic)
    environment = DETERMINISTIC_ENVIRONMENT if deterministic else dict.fromkeys(DETERMINISTIC_ENVIRONMENT)
    assert json.loads(out.read_text()) == {**environment, "cudnn": False, "algorithms": deterministic}
    assert not any(name in os.environ for name in DETERMINISTIC_ENVIRONMENT)


@pytest.mark.parametrize(
    ("name", "value"), [("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")]
)
def test_an_environment_that_forbids_it_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any rank starts, by name and value."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"run\.deterministic needs {name}=.*\(now {value}\)"):
        launch.run(_record, ParallelConfig(), ("unused",), deterministic=True)


def test_own_choices_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """An algorithm of NCCL's and the smaller workspace of cuBLAS are left as the user set them."""
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.delenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", raising=False)
    assert start._deterministic_environment() == {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
