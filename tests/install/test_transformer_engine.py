"""The installer of Transformer Engine: which headers it finds, what it runs, what it refuses. Nothing is compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_fipo import install_transformer_engine as installer

MODULE = "megatron_fipo.install_transformer_engine"


def _headers(folder: Path, *names: str, cuda: int = 13000) -> Path:
    """A folder with `include/` and these headers of CUDA, cuDNN and NCCL."""
    for name in names:
        for header in installer.HEADERS[name]:
            (folder / "include" / header).parent.mkdir(parents=True, exist_ok=True)
            (folder / "include" / header).write_text(f"#define CUDA_VERSION {cuda}\n" if header == "cuda.h" else "")
    return folder


def test_headers_of_pips_packages(tmp_path: Path) -> None:
    """cuDNN, NCCL and CUDA each from the package that has them."""
    nvidia = [
        _headers(tmp_path / folder, name) for folder, name in (("cu13", "CUDA"), ("cudnn", "cuDNN"), ("nccl", "NCCL"))
    ]
    found = installer.include_folders(iter([tmp_path / "cublas", *nvidia]), "13")
    assert found == {"CUDA": nvidia[0] / "include", "cuDNN": nvidia[1] / "include", "NCCL": nvidia[2] / "include"}


def test_headers_of_a_toolkit(tmp_path: Path) -> None:
    """One folder may have all; what comes first wins, package by package."""
    toolkit = _headers(tmp_path / "cuda", "CUDA", "cuDNN", "NCCL")
    cudnn = _headers(tmp_path / "cudnn", "cuDNN")
    found = installer.include_folders(iter([cudnn, toolkit]), "13")
    assert found == {"CUDA": toolkit / "include", "cuDNN": cudnn / "include", "NCCL": toolkit / "include"}


def test_half_a_set_of_headers_does_not_count(tmp_path: Path) -> None:
    """torch's CUDA packages come without crt/, on which cuda_runtime.h depends."""
    runtime = _headers(tmp_path / "cu13", "CUDA")
    assert installer.has_headers(runtime / "include", "CUDA", "13")
    (runtime / "include" / "crt" / "host_config.h").unlink()
    assert not installer.has_headers(runtime / "include", "CUDA", "13")


def test_a_toolkit_of_another_cuda_is_passed_over(tmp_path: Path) -> None:
    """A cluster's default module may be CUDA 12, where torch is of CUDA 13."""
    old, new = _headers(tmp_path / "12", "CUDA", cuda=12080), _headers(tmp_path / "13", "CUDA", "cuDNN", "NCCL")
    assert installer.include_folders(iter([old, new]), "13")["CUDA"] == new / "include"
    with pytest.raises(installer.CannotInstall, match=r"no headers of CUDA 13 \(cuda\.h, "):
        installer.include_folders(iter([old]), "13")


def test_missing_headers_are_named(tmp_path: Path) -> None:
    """With the header, the folders searched, and the variables that add one."""
    cuda = _headers(tmp_path / "cu13", "CUDA")
    with pytest.raises(installer.CannotInstall) as error:
        installer.include_folders(iter([cuda]), "13")
    assert "no headers of cuDNN (cudnn.h) and NCCL (nccl.h)" in str(error.value)
    assert str(cuda / "include") in str(error.value)
    assert "CUDNN_PATH and NCCL_HOME" in str(error.value)


def test_places_that_are_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's packages before the variables, and those before the toolkit of the nvcc on PATH."""
    packages, toolkit = tmp_path / "site-packages", tmp_path / "toolkit"
    (packages / "nvidia" / "cudnn").mkdir(parents=True)
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.setattr(installer.sysconfig, "get_path", lambda name: str(packages))
    monkeypatch.setenv("PATH", str(toolkit / "bin"))
    for name in ("CUDNN_PATH", "CUDNN_HOME", "NCCL_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    found = list(installer.roots())
    assert found[:3] == [packages / "nvidia" / "cudnn", Path("/opt/cuda"), toolkit]


def test_environment_of_the_build(tmp_path: Path) -> None:
    """The compiler searches the found folders first, each once, and then what was set already."""
    cuda, nccl = _headers(tmp_path / "cu13", "CUDA", "cuDNN"), _headers(tmp_path / "nccl", "NCCL")
    (cuda / "lib").mkdir()
    (nccl / "lib64").mkdir()
    folders = installer.include_folders(iter([cuda, nccl]), "13")
    found = installer.build_environment({"CPLUS_INCLUDE_PATH": "/mine", "CUDA_HOME": "/opt/cuda"}, folders, jobs=3)
    assert found["CPLUS_INCLUDE_PATH"].split(os.pathsep) == [str(cuda / "include"), str(nccl / "include"), "/mine"]
    assert found["LIBRARY_PATH"].split(os.pathsep) == [str(cuda / "lib"), str(nccl / "lib64")]
    assert (found["CUDA_HOME"], found["CUDNN_PATH"], found["NCCL_HOME"]) == ("/opt/cuda", str(cuda), str(nccl))
    assert (found["MAX_JOBS"], found["NVTE_FRAMEWORK"]) == ("3", "pytorch")
    assert installer.build_environment({"MAX_JOBS": "1"}, folders, jobs=3)["MAX_JOBS"] == "1"


def test_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kernels as a wheel; the torch part without build isolation and without pip's cache; torch pinned in both."""
    monkeypatch.setattr(installer, "roots", lambda: iter([_headers(tmp_path, "CUDA", "cuDNN", "NCCL")]))
    pinned = []

    def run(command: list[str], show: bool, environment: dict[str, str] | None = None) -> None:
        pinned.append(Path(command[command.index("-c") + 1]).read_text())
        commands.append(command)

    commands: list[list[str]] = []
    monkeypatch.setattr(installer, "run", run)
    monkeypatch.setattr(installer, "_CHECK", "pass")
    installer.install("2.13.0+cu130", "13.0", show=False)
    assert pinned == ["torch==2.13.0+cu130\n"] * 2
    assert f"transformer-engine[core-cu13]=={installer.VERSION}" in commands[0]
    assert {"--no-build-isolation", "--no-cache-dir", f"transformer-engine-torch=={installer.VERSION}"} <= set(
        commands[1]
    )
    assert "compiling its torch part for torch 2.13.0+cu130 with" in capsys.readouterr().out


def test_an_installation_that_does_not_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The last step is an import; what it says is shown."""
    monkeypatch.setattr(installer, "roots", lambda: iter([_headers(tmp_path, "CUDA", "cuDNN", "NCCL")]))
    monkeypatch.setattr(installer, "run", lambda *args: None)
    monkeypatch.setattr(installer, "_CHECK", "raise OSError('libnccl.so.2')")
    with pytest.raises(installer.CannotInstall, match=r"(?s)does not import.*OSError: libnccl\.so\.2"):
        installer.install("2.13.0+cu130", "13.0", show=False)


def test_a_step_that_fails() -> None:
    """The command is named, so that it can be run by hand."""
    with pytest.raises(installer.CannotInstall, match="this failed, see above: A=1 false"):
        installer.run(["false"], False, {**os.environ, "A": "1"})


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("print('hello')", "build for the CPU: run `make install GPU=yes`"),
        ("1 / 0", "has no torch that imports"),
    ],
)
def test_no_torch_for_gpus(tmp_path: Path, answer: str, told: str) -> None:
    """Exit code 1 and a sentence; nothing is installed."""
    (tmp_path / "torch.py").write_text(f"{answer}\n__version__ = '2.13.0+cpu'\nclass version: cuda = None\n")
    done = subprocess.run(
        [sys.executable, "-m", MODULE],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: Transformer Engine: ")
    assert told in done.stderr
