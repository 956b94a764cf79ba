"""The rooms of docs/architecture.md: each imports only rooms listed before it, and few import Megatron."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_fipo

PACKAGE = Path(megatron_fipo.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"


def _listed() -> list[str]:
    """The rooms of docs/architecture.md, as `folder/` or `file.py`."""
    (block,) = re.findall(r"^```text\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return [line.split()[0] for line in block.splitlines()]


LISTED = _listed()
FILES = sorted(str(f.relative_to(PACKAGE)) for f in PACKAGE.rglob("*.py") if f != PACKAGE / "__init__.py")
KNOWS_MEGATRON = {"parallel/", "model/", "convert/", "actor/", "checkpoint/"}
READS_GLOBAL_STATE = {"parallel/topology.py", "parallel/cpu_backend.py"}


def _room_of_path(path: str) -> str | None:
    """The room of a file, or of what a dotted name is as a path: the longest entry that begins it."""
    found = [room for room in LISTED if path == room or (room.endswith("/") and f"{path}/".startswith(room))]
    return max(found, key=len, default=None)


def _room_of_name(name: str) -> str | None:
    """The room of `megatron_fipo.a.b`: a module, or what it defines."""
    parts = name.split(".")[1:]
    return _room_of_path(f"{parts[0]}.py") or _room_of_path("/".join(parts))


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


def test_every_file_is_in_a_room() -> None:
    """No file of the package is outside the list, no entry of the list is without a file, and none is there twice."""
    assert {_room_of_path(f) for f in FILES} == set(LISTED)
    assert len(LISTED) == len(set(LISTED))


@pytest.mark.parametrize("file", FILES)
def test_imports_go_one_way(file: str) -> None:
    """A file imports its own room and rooms before it."""
    room = _room_of_path(file)
    assert room is not None
    allowed = set(LISTED[: LISTED.index(room) + 1])
    wrong = [
        f"{file}:{line} imports {name}"
        for line, name in _imports(file)
        if name.split(".")[0] == "megatron_fipo" and _room_of_name(name) not in allowed
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("name", "room"),
    [
        ("megatron_fipo.batch.pack", "batch.py"),
        ("megatron_fipo.launch", "launch/"),
        ("megatron_fipo.scaling.cost.layout.Layout", "scaling/cost/"),
        ("megatron_fipo.scaling.command.app", "scaling/"),
        ("megatron_fipo.nothing", None),
    ],
)
def test_rooms_of_names(name: str, room: str | None) -> None:
    """Modules and what they define; a folder of several rooms, and a name in none."""
    assert _room_of_name(name) == room


@pytest.mark.parametrize("file", [f for f in FILES if _room_of_path(f) not in KNOWS_MEGATRON])
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
