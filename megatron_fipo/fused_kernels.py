"""Check of whether NVIDIA Transformer Engine can be used here, and if not, why.

Megatron-Core imports Transformer Engine and apex wherever they are installed. Without a GPU its optimizer then calls
their CUDA kernels all the same, and an installation that raises anything but ImportError ends the import of
Megatron-Core itself. `hide_unusable` keeps both from it, and must run before the first `import megatron.core`.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

import torch

from megatron_fipo.config import Config

# What Megatron-Core imports. torch comes first: it loads the CUDA libraries that Transformer Engine is linked to.
_IMPORTS = ("torch", "transformer_engine.pytorch.fp8", "transformer_engine.pytorch.optimizers")
_IMPORT_SECONDS = 300.0  # a cold network file system
_IN_CHILD = """
import importlib, json, sys
sys.path[:] = json.loads(sys.argv[1])
try:
    for name in sys.argv[2:]:
        importlib.import_module(name)
    error = None
except Exception as raised:
    error = f"{type(raised).__name__}: {raised}"
print(json.dumps(error))
"""


@dataclass(frozen=True)
class TransformerEngine:
    """State of Transformer Engine on this machine.

    Attributes:
        version: installed version; None: not installed.
        error: what its import raised; None: nothing, or it is not installed.
        gpu_obstacle: why torch has no GPU here; None: it has one.
    """

    version: str | None
    error: str | None
    gpu_obstacle: str | None

    @property
    def usable(self) -> bool:
        return not (self.installation_problem or self.gpu_obstacle)

    @property
    def installation_problem(self) -> str | None:
        """Problem of the installation and the command that fixes it; None if it can be imported."""
        if self.version is None:
            return "Transformer Engine is not installed: run `make install GPU=yes`, or use an image that has it"
        if self.error is not None:
            return (
                f"Transformer Engine {self.version} is installed but cannot be imported ({self.error}): rebuild it for "
                f"this torch with `{sys.executable} -m megatron_fipo.install_transformer_engine`, or run "
                "`pip uninstall transformer-engine transformer-engine-torch`"
            )
        return None


def find_transformer_engine() -> TransformerEngine:
    """Find Transformer Engine, and import it in another process to check that it works."""
    version = _installed_version()
    error = None if version is None else _import_error()
    return TransformerEngine(version, error, gpu_obstacle())


def use_transformer_engine(choice: str) -> bool:
    """Resolve model.transformer_engine on this machine.

    Raises:
        ValueError: it was asked for and cannot be used, or `auto` meets a GPU and a broken installation.
    """
    if choice == "off" or (choice == "auto" and gpu_obstacle()):
        return False
    found = find_transformer_engine()
    problems = transformer_engine_problems(choice, found)
    if problems:
        raise ValueError("\n".join(problems))
    return found.usable


def transformer_engine_problems(
    choice: str, found: TransformerEngine | None = None, *, needs_gpu: bool = True
) -> list[str]:
    """List why model.transformer_engine=`choice` cannot be met here; of `auto`, only a broken installation.

    Args:
        found: what `find_transformer_engine` returned, if it was asked already.
        needs_gpu: count the lack of a GPU; False on a login node, whose jobs run elsewhere.
    """
    if choice == "off" or (choice == "auto" and needs_gpu and gpu_obstacle()):
        return []
    found = found or find_transformer_engine()
    problems = []
    if found.installation_problem and (choice == "on" or found.error):
        problems.append(f"model.transformer_engine={choice}: {found.installation_problem}")
    if choice == "on" and needs_gpu and found.gpu_obstacle:
        problems.append(
            f"model.transformer_engine=on needs a GPU: {found.gpu_obstacle}. Run it on a GPU node, or set "
            "model.transformer_engine=off"
        )
    return problems


def check_context_parallelism(config: Config) -> None:
    """Refuse context parallelism on a GPU without Transformer Engine.

    torch's layers mask it explicitly, which no flash kernel takes: attention would need memory for every pair of
    tokens, and be many times slower.

    Raises:
        ValueError: what to change.
    """
    size = config.parallel.context
    if size > 1 and torch.cuda.is_available() and not use_transformer_engine(config.model.transformer_engine):
        raise ValueError(
            f"parallel.context={size} on a GPU needs Transformer Engine, which is "
            f"{'switched off' if config.model.transformer_engine == 'off' else 'not installed'} "
            f"(model.transformer_engine={config.model.transformer_engine}): install transformer-engine and leave the "
            "setting at auto, or set parallel.context=1 and, for long sequences, raise parallel.tensor"
        )


def gpu_compiler_problem() -> str | None:
    """Return why torch.compile cannot make kernels for a GPU here; None: it can.

    Triton, which it takes, compiles a C function that starts each kernel.
    """
    if find_spec("triton") is None:
        return "Triton is not installed: it comes with torch's CUDA builds"
    if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang")))):
        return "there is no C compiler: install gcc, or set CC"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        return f"{header} is missing: install Python's headers"
    return None


def compile_activation() -> bool:
    """Return whether SwiGLU of torch's layers is one compiled kernel: on GPUs where a compiler is there."""
    return gpu_obstacle() is None and gpu_compiler_problem() is None


def gpu_obstacle() -> str | None:
    """Return why torch has no GPU here; None: it has one."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built for the CPU alone (`make install GPU=yes` installs a CUDA build)"
    return f"torch {torch.__version__} finds no GPU on this machine"


def hide_unusable() -> None:
    """Make `import transformer_engine` and `import apex` fail with ModuleNotFoundError where they cannot be used.

    Megatron-Core then takes torch's functions instead. Python raises that error for modules that are None in
    `sys.modules`.
    """
    on_gpu = torch.cuda.is_available()
    if not (on_gpu and find_transformer_engine().usable):
        _hide("transformer_engine")
    if not on_gpu:
        _hide("apex")
        _hide("amp_C")  # apex's kernels


def _installed_version() -> str | None:
    # Not importlib.util.find_spec, which finds nothing once the package is hidden.
    try:
        return metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return None if PathFinder.find_spec("transformer_engine") is None else "of unknown version"


def _import_error() -> str | None:
    # On a GPU this process imports it in any case. Elsewhere it stays out of this process, where it is hidden.
    return _error_here() if torch.cuda.is_available() else _error_in_child(tuple(sys.path))


@cache
def _error_here() -> str | None:
    try:
        for name in _IMPORTS:
            importlib.import_module(name)
    except Exception as error:  # whatever a broken installation raises
        return f"{type(error).__name__}: {error}"
    return None


@cache
def _error_in_child(path: tuple[str, ...]) -> str | None:
    command = [sys.executable, "-c", _IN_CHILD, json.dumps(path), *_IMPORTS]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"the import did not end within {_IMPORT_SECONDS:.0f} s"
    if done.returncode < 0:
        return f"the import was ended by signal {-done.returncode}"
    if done.returncode > 0:
        return f"the import ended Python with exit code {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1])  # the package may print as well


def _hide(package: str) -> None:
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        del sys.modules[name]
    sys.modules[package] = None  # type: ignore[assignment]
