"""Builds the extension; everything else about the package is in pyproject.toml. Switches, all in the environment:

MEGATRON_FIPO_EXTENSION=0    install without the extension (no compiler needed); the losses then run in plain torch
MEGATRON_FIPO_CUDA=0|1|auto  CUDA kernels: never, always, or where nvcc is found (the default)
MEGATRON_FIPO_SANITIZE=1     a build for `make sanitize`: AddressSanitizer and UndefinedBehaviorSanitizer

`pip install -v` shows what was chosen, and so does `megatron-fipo doctor`.
"""

import os
import platform
import shlex
import shutil
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


@dataclass
class CudaPart:
    """What the CUDA step adds to the build; nothing where it is off."""

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
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    if wanted == "0" or not sources:
        return CudaPart("off (MEGATRON_FIPO_CUDA=0)" if wanted == "0" else "off (no kernels in csrc/cuda)")
    return CudaPart("off")


# ---- CPU and binding ----


def cpu_sources() -> list[Path]:
    """The translation units for this machine's architecture."""
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
    if os.environ.get("MEGATRON_FIPO_EXTENSION", "1") == "0":
        print("megatron_fipo extension: off (MEGATRON_FIPO_EXTENSION=0)")
        return []
    sources = sorted(str(path) for path in CSRC.rglob("*") if path.suffix in (".cpp", ".cu"))
    headers = sorted(str(path) for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh"))
    return [Extension("megatron_fipo.ops._extension", sources, depends=headers, language="c++")]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExtension})
