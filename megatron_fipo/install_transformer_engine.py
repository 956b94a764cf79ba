"""Install NVIDIA Transformer Engine into the environment whose Python runs this file, for the torch that is there.

Its kernels come as a wheel; its torch part is C++ that pip compiles against the installed torch, so build isolation is
off, and against headers of CUDA, cuDNN and NCCL, which are looked for in pip's nvidia packages and in the CUDA toolkit.
No GPU and no nvcc is needed. `make install GPU=yes` runs it.

    python -m megatron_fipo.install_transformer_engine [--show]

--show prints what would be done. Nothing is done where the installed version imports already.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

VERSION = "2.20.2"
_CORE_MINUTES = 50.0  # of compilation, shared by the cores: 25 minutes on two
_GB_PER_COMPILER = 3.0  # memory that one compiler process takes
_CHECK = (
    "import torch, transformer_engine.pytorch.fp8, transformer_engine.pytorch.optimizers as o; "
    f"import importlib.metadata as m; assert m.version('transformer-engine') == '{VERSION}', 'another version'"
)
# What each package must show: a header, and one that only a complete set of headers has.
HEADERS = {
    "CUDA": ("cuda.h", "cuda_runtime.h", "crt/host_config.h", "cublas_v2.h", "nvrtc.h"),
    "cuDNN": ("cudnn.h",),
    "NCCL": ("nccl.h",),
}


class CannotInstall(Exception):
    """Missing requirement, with instructions."""


def main() -> None:
    """Install Transformer Engine."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--show", action="store_true", help="print commands and environment, and do nothing")
    show = arguments.parse_args().show
    try:
        torch_version, cuda = installed_torch()
        if not show and imports():
            print(f"Transformer Engine {VERSION} is installed and imports")
            return
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            raise CannotInstall("no C++ compiler: install g++ 9 or later, or name yours with CXX=...")
        install(torch_version, cuda, show)
    except CannotInstall as error:
        sys.exit(f"error: Transformer Engine: {error}")


def installed_torch() -> tuple[str, str]:
    """Return torch's version and its CUDA's.

    Raises:
        CannotInstall: there is no torch with CUDA.
    """
    ask = "import torch; print(torch.__version__, torch.version.cuda)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    version, _, cuda = done.stdout.strip().rpartition("\n")[2].partition(" ")
    if done.returncode:
        raise CannotInstall(f"{sys.executable} has no torch that imports: {done.stderr.strip()[-300:]}")
    if cuda == "None":
        raise CannotInstall(f"torch {version} is a build for the CPU: run `make install GPU=yes`, which replaces it")
    return version, cuda


def imports() -> bool:
    """Return whether this version works with the installed torch, tried in a separate process."""
    return subprocess.run([sys.executable, "-c", _CHECK], capture_output=True, check=False).returncode == 0


def install(torch_version: str, cuda: str, show: bool) -> None:
    """Install the kernels, what the build needs, and the torch part; then import it.

    Raises:
        CannotInstall: headers are missing, or a step failed.
    """
    major = cuda.partition(".")[0]
    with tempfile.TemporaryDirectory() as directory:
        pin = Path(directory) / "torch.txt"  # whatever is installed here, torch stays the one that is there
        pin.write_text(f"torch=={torch_version}\n")
        pip = [sys.executable, "-m", "pip", "install", "-c", str(pin)]
        run([*pip, f"transformer-engine[core-cu{major}]=={VERSION}", "setuptools", "wheel", "ninja", "pybind11"], show)
        if not any(has_headers(place / "include", "CUDA", major) for place in roots()):
            run([*pip, f"cuda-toolkit[nvcc,crt,cccl]=={cuda}.*"], show)  # headers that torch's own packages lack
        folders = {} if show else include_folders(roots(), major)
        environment = build_environment(os.environ, folders, cores())
        # A wheel in pip's cache may be of another torch, and what it was built for is not in its name.
        build = [*pip, "--no-build-isolation", "--no-cache-dir", f"transformer-engine-torch=={VERSION}"]
        minutes = _CORE_MINUTES / int(environment["MAX_JOBS"])
        print(
            f"Transformer Engine {VERSION}: compiling its torch part for torch {torch_version} with "
            f"{environment['MAX_JOBS']} compilers, about {minutes:.0f} minutes",
            flush=True,
        )
        run(build, show, environment)
    if show:
        return
    done = subprocess.run([sys.executable, "-c", _CHECK], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotInstall(f"it was installed, but does not import:\n{done.stderr.strip()[-2000:]}")
    print(f"Transformer Engine {VERSION} imports")


def run(command: Sequence[str], show: bool, environment: Mapping[str, str] | None = None) -> None:
    """Run a step, or print it.

    Raises:
        CannotInstall: it failed.
    """
    changed = {k: v for k, v in (environment or {}).items() if os.environ.get(k) != v}
    text = " ".join([*(f"{name}={value}" for name, value in changed.items()), *command])
    if show:
        print(text)
    elif subprocess.run(command, env=environment, check=False).returncode:
        raise CannotInstall(f"this failed, see above: {text}")


def roots() -> Iterator[Path]:
    """Folders that may have an `include` folder: pip's nvidia packages, then the toolkit."""
    nvidia = Path(sysconfig.get_path("purelib")) / "nvidia"
    yield from sorted(nvidia.iterdir()) if nvidia.is_dir() else ()
    for name in ("CUDNN_PATH", "CUDNN_HOME", "NCCL_HOME", "CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        yield Path(nvcc).resolve().parents[1]
    yield Path("/usr/local/cuda")
    yield Path("/usr")  # distributions' packages of cuDNN and NCCL


def has_headers(folder: Path, name: str, cuda: str) -> bool:
    """Return whether all headers of a package are in a folder, and CUDA's have the major version `cuda`."""
    if not all((folder / header).is_file() for header in HEADERS[name]):
        return False
    return name != "CUDA" or _cuda_major(folder / "cuda.h") == cuda


def _cuda_major(header: Path) -> str:
    defined = re.search(r"^#define CUDA_VERSION (\d+)", header.read_text(), re.MULTILINE)
    return str(int(defined[1]) // 1000) if defined else "unknown"


def include_folders(roots: Iterator[Path], cuda: str) -> dict[str, Path]:
    """Return where the headers of CUDA, cuDNN and NCCL are, the first match of each.

    Args:
        cuda: major version of torch's CUDA.

    Raises:
        CannotInstall: some are nowhere.
    """
    candidates = [root / "include" for root in roots]
    found = {name: next((folder for folder in candidates if has_headers(folder, name, cuda)), None) for name in HEADERS}
    missing = [
        f"{name + ' ' + cuda if name == 'CUDA' else name} ({', '.join(HEADERS[name])})"
        for name, folder in found.items()
        if folder is None
    ]
    if missing:
        raise CannotInstall(
            f"no headers of {' and '.join(missing)} in {', '.join(map(str, candidates))}: install the CUDA toolkit "
            "with cuDNN and NCCL, and set CUDA_HOME, CUDNN_PATH and NCCL_HOME"
        )
    return {name: folder for name, folder in found.items() if folder is not None}


def build_environment(base: Mapping[str, str], folders: Mapping[str, Path], jobs: int) -> dict[str, str]:
    """Return the environment of the compilation.

    Args:
        folders: include folders, in the order in which the compiler is to search them.
        jobs: compilers at the same time.
    """
    unique = list(dict.fromkeys(folders.values()))
    libraries = [folder.parent / name for folder in unique for name in ("lib", "lib64")]
    environment = {
        **base,
        "NVTE_FRAMEWORK": "pytorch",
        "MAX_JOBS": base.get("MAX_JOBS", str(jobs)),
        "CPLUS_INCLUDE_PATH": _joined([*map(str, unique), base.get("CPLUS_INCLUDE_PATH", "")]),
        "LIBRARY_PATH": _joined([*(str(p) for p in libraries if p.is_dir()), base.get("LIBRARY_PATH", "")]),
    }
    for name, package in (("CUDA_HOME", "CUDA"), ("CUDNN_PATH", "cuDNN"), ("NCCL_HOME", "NCCL")):
        if package in folders:
            environment.setdefault(name, str(folders[package].parent))
    return environment


def _joined(paths: Sequence[str]) -> str:
    return os.pathsep.join(path for path in paths if path)


def cores() -> int:
    """Compilers that this machine has cores and memory for."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2**30
    return max(1, min(usable, int(memory / _GB_PER_COMPILER)))


if __name__ == "__main__":
    main()
