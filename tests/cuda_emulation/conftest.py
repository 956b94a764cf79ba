"""Builds csrc/cuda for the emulation once, and puts it in the place of the compiled CPU kernels."""

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from megatron_fipo.ops import extension

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
# Another namespace: the classes that pybind11 knows of the extension proper must not be met twice.
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Dfipo=fipo_emulated"]


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    """The kernels of csrc/cuda over emulated threads, as a module like `_extension`."""
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("g++") is None or not extension.is_built():
        pytest.skip("needs g++ and the compiled extension, whose ops the emulated kernels serve")
    build = tmp_path_factory.mktemp("cuda_emulation")
    includes = [f"-I{HERE / 'include'}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    defines = ["-DMEGATRON_FIPO_CUDA", '-DMEGATRON_FIPO_BUILD="emulation"']
    sources = [HERE / "kernels.cpp", CSRC / "binding.cpp"]
    commands = [
        ["g++", *FLAGS, "-Wno-unknown-pragmas", *includes, *defines, "-c", str(source), "-o", str(build / source.stem)]
        for source in sources
    ]
    for compiler in [subprocess.Popen(command) for command in commands]:
        assert compiler.wait() == 0
    library = build / "_extension.so"
    subprocess.run(["g++", "-shared", "-pthread", build / "kernels", build / "binding", "-o", library], check=True)
    spec = importlib.util.spec_from_file_location("_extension", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def emulated(emulation, monkeypatch):
    """emulated(shape): from here on, the compiled ops run the emulated kernels of this shape."""

    def use(shape):
        monkeypatch.setenv("FIPO_EMULATED_SHAPE", shape)
        monkeypatch.setattr(extension, "_extension", emulation)
        return emulation

    return use
