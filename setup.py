"""Builds the extension; everything else about the package is in pyproject.toml. Switches, all in the environment:

MEGATRON_FIPO_EXTENSION=0    install without the extension (no compiler needed); the losses then run in plain torch
MEGATRON_FIPO_CUDA=0|1|auto  CUDA kernels: never, always, or where nvcc is found (the default)
MEGATRON_FIPO_SANITIZE=1     a build for `make sanitize`: AddressSanitizer and UndefinedBehaviorSanitizer

`pip install -v` shows what was chosen, and so does `megatron-fipo doctor`.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
SANITIZE = os.environ.get("MEGATRON_FIPO_SANITIZE", "0") == "1"
OPTIMIZE = ["-O1", "-g", "-fno-omit-frame-pointer"] if SANITIZE else ["-O3", "-g0"]
BINDING_FLAGS = ["-O1"]  # its templates take longest to compile, and it is called twice a micro-batch
SANITIZER = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if SANITIZE else []
# Contraction off: whether a product and a sum become one rounding is the kernels' decision, not the compiler's.
CXX_FLAGS = ["-std=c++17", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", *OPTIMIZE]
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mbmi", "-mbmi2", "-mpopcnt"],
}
QUIET_FLAGS = {"avx512": ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]}  # GCC 12 warns about its own header


CUDA_ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


@dataclass
class CudaPart:
    """Return the CUDA sources and build options; nothing where the CUDA step is off."""

    summary: str  # what was chosen and why
    objects: list[str] = field(default_factory=list)
    link_flags: list[str] = field(default_factory=list)

    @property
    def macros(self) -> list[str]:
        return ["-DMEGATRON_FIPO_CUDA"] if self.objects else []


# ---- CUDA ----


def compile_cuda(build_dir: Path) -> CudaPart:
    """Compile csrc/cuda with nvcc where that is asked for or found; a GPU or a CUDA torch is not needed."""
    wanted = os.environ.get("MEGATRON_FIPO_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise SystemExit(f"error: MEGATRON_FIPO_CUDA={wanted} must be 0, 1 or auto")
    if wanted == "0":
        return CudaPart("off (MEGATRON_FIPO_CUDA=0)")
    nvcc = find_nvcc()
    if nvcc is None and wanted == "1":
        raise SystemExit(
            "error: MEGATRON_FIPO_CUDA=1, but nvcc is neither on PATH nor in $CUDA_HOME/bin. Install the CUDA toolkit "
            "(12.0 or later), or leave the variable unset to build without CUDA kernels"
        )
    if nvcc is None:
        return CudaPart("off (no nvcc)")
    architectures = cuda_architectures(nvcc)
    flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *gencode_flags(architectures)]
    if "CXX" in os.environ:
        flags += ["-ccbin", shlex.split(os.environ["CXX"])[0]]

    def compile_one(source: Path) -> str:
        target = build_dir / f"{source.stem}.cuda.o"
        command = [nvcc, *flags, "-c", str(source), "-o", str(target)]
        if subprocess.run(command).returncode != 0:
            raise SystemExit(
                f"error: nvcc could not compile {source}, see above. Repair the CUDA toolkit, or set "
                "MEGATRON_FIPO_CUDA=0 to install without CUDA kernels (the losses then run in plain torch on GPUs)"
            )
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sorted((CSRC / "cuda").glob("*.cu"))))
    return CudaPart(", ".join(architectures), objects, cuda_link_flags(nvcc))


def find_nvcc() -> str | None:
    """Return the path of nvcc, from CUDA_HOME if it is set."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def cuda_architectures(nvcc: str) -> list[str]:
    """Return the `CUDA_ARCHITECTURES` that this nvcc supports; newer GPUs compile the last one's PTX at start-up."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True)
    if listed.returncode != 0:
        raise SystemExit(
            f"error: `{nvcc} --list-gpu-code` failed with exit code {listed.returncode}: {listed.stderr.strip()}. "
            "Repair the CUDA toolkit (12.0 or later), or set MEGATRON_FIPO_CUDA=0 to install without CUDA kernels"
        )
    known = listed.stdout.split()
    return [name for name in CUDA_ARCHITECTURES if name in known]


def gencode_flags(architectures: list[str]) -> list[str]:
    """Return nvcc's flags for machine code of all architectures, and PTX of the last one."""
    numbers = [name.removeprefix("sm_") for name in architectures]
    machine_code = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return [*machine_code, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]


def cuda_link_flags(nvcc: str) -> list[str]:
    """Return the flags that link the CUDA runtime statically, independent of the one in torch."""
    probe = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    dry_run = subprocess.run(probe, capture_output=True, text=True).stderr  # names the toolkit's library folders
    folders = re.findall(r'"(-L[^"]*)"', "".join(line for line in dry_run.splitlines() if "LIBRARIES=" in line))
    return [*folders, "-lcudart_static", "-lrt", "-ldl", "-lpthread"]


# ---- CPU and binding ----


def cpu_sources() -> list[Path]:
    """Return the translation units for this machine's architecture."""
    on_x86 = platform.machine() in ("x86_64", "AMD64")
    return [path for path in sorted((CSRC / "cpu").glob("*.cpp")) if on_x86 or path.stem not in ISA_FLAGS]


class BuildExtension(build_ext):
    """One compiler call a file, since instruction sets are chosen per file, and then the link."""

    def build_extension(self, ext: Extension) -> None:
        compiler = self.compiler.compiler_so_cxx if hasattr(self.compiler, "compiler_so_cxx") else ["g++"]
        command = shlex.split(os.environ.get("CXX", "")) or [compiler[0]]
        if not shutil.which(command[0]):
            raise SystemExit(
                f"error: no C++ compiler ({command[0]} is not found). Install g++ 9 or later, or name yours with "
                "CXX=..., or set MEGATRON_FIPO_EXTENSION=0 to install without the extension (the losses then run "
                "in plain torch, more than ten times slower)"
            )
        import pybind11  # a requirement of the build, see pyproject.toml

        build_dir = Path(self.build_temp)
        build_dir.mkdir(parents=True, exist_ok=True)
        cuda = compile_cuda(build_dir)
        isas = [path.stem for path in cpu_sources() if path.stem in ("scalar", *ISA_FLAGS)]
        summary = f"{' '.join(command)}; CPU: {', '.join(isas)}; CUDA: {cuda.summary}"
        summary += "; sanitizers" if SANITIZE else ""
        print(f"megatron_fipo extension: {summary}")

        includes = [f"-I{path}" for path in (*self.compiler.include_dirs, pybind11.get_include())]
        includes += [f"-I{path}" for path in self.include_dirs]
        define = f'-DMEGATRON_FIPO_BUILD="{summary}"'

        def compile_one(source: Path) -> str:
            flags = [*CXX_FLAGS, *SANITIZER, *ISA_FLAGS.get(source.stem, []), *QUIET_FLAGS.get(source.stem, [])]
            if source.stem == "binding":
                flags += [*includes, *BINDING_FLAGS, *cuda.macros, define]
            target = build_dir / f"{source.stem}.o"
            self.spawn([*command, *flags, "-c", str(source), "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, [CSRC / "binding.cpp", *cpu_sources()]))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        link = [*command, "-shared", "-fopenmp", *SANITIZER, *([] if SANITIZE else ["-s"])]
        self.spawn([*link, *objects, *cuda.objects, *cuda.link_flags, "-o", str(target)])


def extensions() -> list[Extension]:
    """Return the extension to build, or none if it is switched off."""
    if os.environ.get("MEGATRON_FIPO_EXTENSION", "1") == "0":
        print("megatron_fipo extension: off (MEGATRON_FIPO_EXTENSION=0)")
        return []
    sources = sorted(str(path) for path in CSRC.rglob("*") if path.suffix in (".cpp", ".cu"))
    headers = sorted(str(path) for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh"))
    return [Extension("megatron_fipo.ops._extension", sources, depends=headers, language="c++")]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
