"""Whether Transformer Engine may be used here, and why not; and that Megatron-Core sees it only then."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo import fused_kernels
from megatron_fipo.fused_kernels import TransformerEngine, find_transformer_engine, use_transformer_engine
from tests.support.installations import BROKEN, VERSION, install_transformer_engine

GPU = None  # no obstacle


def _state(**given: Any) -> TransformerEngine:
    return TransformerEngine(**{"version": VERSION, "error": None, "gpu_obstacle": GPU, **given})


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_not_installed() -> None:
    """Nothing is imported to find that out."""
    found = find_transformer_engine()
    assert (found.version, found.error, found.usable) == (None, None, False)
    assert "make install GPU=yes" in str(found.installation_problem)


def test_found_where_pip_puts_it(on_path: Path) -> None:
    """Its torch library lies in transformer_engine/wheel_lib/, where no `import transformer_engine_torch` finds it."""
    install_transformer_engine(on_path)
    assert util.find_spec("transformer_engine_torch") is None
    found = find_transformer_engine()
    assert (found.version, found.error, found.installation_problem) == (VERSION, None, None)


@pytest.mark.parametrize(
    "error", [error if error == "RuntimeError" else pytest.param(error, marks=pytest.mark.slow) for error in BROKEN]
)
def test_a_broken_installation_is_named(on_path: Path, error: str) -> None:
    """Whatever its import raises is told, with its message; an ImportError that the package hides as well."""
    install_transformer_engine(on_path, error)
    found = find_transformer_engine()
    assert str(found.error).startswith(f"{error}: ")
    assert str(found.error).split(": ", 1)[1] in BROKEN[error]
    assert not found.usable
    assert f"Transformer Engine {VERSION} is installed but cannot be imported" in str(found.installation_problem)


@pytest.mark.parametrize(
    ("code", "told"),
    [("import os; os.kill(os.getpid(), 11)", "ended by signal 11"), ("raise SystemExit(7)", "exit code 7")],
)
@pytest.mark.slow  # two more interpreters
def test_an_import_that_ends_python(on_path: Path, code: str, told: str) -> None:
    """It ends a process of its own, not this one."""
    install_transformer_engine(on_path)
    (on_path / "transformer_engine" / "pytorch" / "__init__.py").write_text(code)
    assert told in str(find_transformer_engine().error)


NOT_INSTALLED = {"version": None}
NO_GPU = {"gpu_obstacle": "torch finds no GPU on this machine"}
BROKEN_HERE = {"error": "OSError: libcudnn"}


@pytest.mark.parametrize(
    ("choice", "state", "expected"),
    [
        ("on", {}, True),
        ("auto", {}, True),
        ("off", {}, False),
        ("auto", NOT_INSTALLED, False),
        ("off", NOT_INSTALLED, False),
        ("on", NOT_INSTALLED, "not installed"),
        ("auto", NO_GPU, False),
        ("on", NO_GPU, "needs a GPU: torch finds no GPU on this machine"),
        ("auto", BROKEN_HERE, r"cannot be imported \(OSError: libcudnn\)"),
        ("on", BROKEN_HERE, r"cannot be imported \(OSError: libcudnn\)"),
        ("off", BROKEN_HERE, False),
        ("auto", BROKEN_HERE | NO_GPU, False),  # nothing would use it
        ("on", BROKEN_HERE | NO_GPU, r"(?s)cannot be imported.*needs a GPU"),
    ],
)
def test_the_setting(monkeypatch: pytest.MonkeyPatch, choice: str, state: dict[str, Any], expected: bool | str) -> None:
    """`auto` falls back where there is nothing to use, and never past an installation that is broken."""
    monkeypatch.setattr(fused_kernels, "find_transformer_engine", lambda: _state(**state))
    monkeypatch.setattr(fused_kernels, "gpu_obstacle", lambda: state.get("gpu_obstacle"))
    if isinstance(expected, bool):
        assert use_transformer_engine(choice) is expected
    else:
        with pytest.raises(ValueError, match=expected):
            use_transformer_engine(choice)


def test_a_cpu_build_of_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with GPUs this is what hides them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for the CPU alone (`make install GPU=yes`" in str(fused_kernels.gpu_obstacle())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "finds no GPU on this machine" in str(fused_kernels.gpu_obstacle())


_WHAT_MEGATRON_TAKES = """
import json, sys
import torch
if sys.argv[1] == "gpu":  # as far as the choice of modules goes
    torch.cuda.is_available = lambda: True
from megatron_fipo import fused_kernels
fused_kernels.hide_unusable()
try:
    from transformer_engine.pytorch.optimizers import FusedAdam
    seen = True
except ImportError:
    seen = False
chosen = None
if not seen:  # nor would Megatron-Core find what else it needs in the stand-in
    import megatron.core.optimizer, megatron.core.optimizer.clip_grads as clip_grads
    chosen = [megatron.core.optimizer.Adam.__module__, clip_grads.l2_norm_impl.__module__]
print(json.dumps([seen, chosen, fused_kernels.find_transformer_engine().error]))
"""


@pytest.mark.parametrize(
    ("machine", "error", "seen"),
    [
        ("cpu", "RuntimeError", False),
        # Each imports torch and Megatron-Core in an interpreter of its own, which takes seven seconds.
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("cpu", None, False),
                ("gpu", None, True),
                ("cpu", "OSError", False),
                *(("gpu", error, False) for error in BROKEN),
            ]
        ),
    ],
)
def test_what_megatron_core_sees(tmp_path: Path, machine: str, error: str | None, seen: bool) -> None:
    """Without a GPU, or where it is broken, Megatron-Core is imported and takes torch's Adam and its own norm."""
    install_transformer_engine(tmp_path, error)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{_WHAT_MEGATRON_TAKES}"
    done = subprocess.run([sys.executable, "-c", code, machine], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    visible, chosen, told = json.loads(done.stdout.splitlines()[-1])
    assert visible is seen
    assert chosen == (None if seen else ["torch.optim.adamw", "megatron.core.utils"])
    assert (told is None) == (error is None)


def test_apex_is_hidden_without_a_gpu() -> None:
    """Its kernels would be called on CPU tensors."""
    importlib.import_module("megatron_fipo.parallel")
    assert [sys.modules[name] for name in ("apex", "amp_C")] == [None, None] or torch.cuda.is_available()
