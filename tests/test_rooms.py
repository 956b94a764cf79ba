"""The house's plan: a room imports only rooms named before it, and few rooms know Megatron."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_fipo

PACKAGE = Path(megatron_fipo.__file__).parent
ORDER = (
    *("metric_glossary", "former_names"),
    *("install_transformer_engine", "exit_codes", "printable", "atomic_file", "machine", "config", "batch", "ops"),
    *("algorithm", "reward", "data", "fused_kernels", "parallel", "model", "convert", "actor", "vllm_environment"),
    *("rollout", "batching", "checkpoint", "evaluation", "health", "trackers", "run_lock", "run_log", "resume"),
    *(
        "checks",
        "run_state",
        "data_check",
        "trainer",
        "launch",
        "scaling",
        "report",
        "doctor",
        "convert_command",
        "cli",
    ),
)
FILES = sorted(str(f.relative_to(PACKAGE)) for f in PACKAGE.rglob("*.py") if f != PACKAGE / "__init__.py")
KNOWS_MEGATRON = {"parallel", "model", "convert", "actor", "checkpoint"}
READS_GLOBAL_STATE = {"parallel/topology.py", "parallel/cpu_backend.py"}


def _room(file: str) -> str:
    return Path(file).parts[0].removesuffix(".py")


def _imports(file: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, those inside functions and `if TYPE_CHECKING` included."""
    package = ["megatron_fipo", *Path(file).parent.parts]
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from megatron_fipo import launch` names a room; `from megatron_fipo.batch import pack` a function.
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def test_every_room_is_in_the_order() -> None:
    """No file or folder of the package stands outside the order."""
    assert {_room(f) for f in FILES} <= set(ORDER)


@pytest.mark.parametrize("file", FILES)
def test_imports_go_one_way(file: str) -> None:
    """A file imports its own room and rooms before it."""
    allowed = set(ORDER[: ORDER.index(_room(file)) + 1])
    wrong = [
        f"{file}:{line} imports {name}"
        for line, name in _imports(file)
        if name.split(".")[0] == "megatron_fipo" and name.split(".")[1] not in allowed
    ]
    assert not wrong


@pytest.mark.parametrize("file", [f for f in FILES if _room(f) not in KNOWS_MEGATRON])
def test_megatron_stays_in_its_rooms(file: str) -> None:
    """Outside parallel, model, convert, actor and checkpoint nothing imports megatron."""
    assert [f"{file}:{line}" for line, name in _imports(file) if name.split(".")[0] == "megatron"] == []


@pytest.mark.parametrize("file", [f for f in FILES if f not in READS_GLOBAL_STATE])
def test_global_parallel_state_is_read_in_one_place(file: str) -> None:
    """Only the topology, and the CPU backend that prepares it, mention Megatron's parallel_state."""
    tree = ast.parse((PACKAGE / file).read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {part for _, name in _imports(file) for part in name.split(".")}
    assert not names & {"parallel_state", "mpu"}
