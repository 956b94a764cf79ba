"""The package's modules import each other in one direction, keep private names to themselves, and stay short."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.structure import LONG_FILES, PRIVATE_IMPORTS, ROOT, problems


def test_this_tree_has_no_problems() -> None:
    """No import cycle, no private import, no long file or function but for the listed exceptions, all still needed."""
    assert problems(ROOT, PRIVATE_IMPORTS, LONG_FILES) == []


def _tree(root: Path, **files: str) -> Path:
    """Write modules of the package, named as in `room__module`; `docs` is a page's script."""
    for name, text in {"__init__": "", "room____init__": "", **files}.items():
        path = root / ("docs/docs.py" if name == "docs" else f"megatron_fipo/{name.replace('__', '/', 1)}.py")
        if name == "__init__":
            path = root / "megatron_fipo" / "__init__.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    "back",
    [
        "from megatron_fipo.room import a",
        "from megatron_fipo.room.a import x",
        "import megatron_fipo.room.a",
        "from . import a",
        "from .a import x",
        "def f():\n    from megatron_fipo.room.a import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from megatron_fipo.room.a import x",
        'import importlib\nimportlib.import_module("megatron_fipo.room.a")',
        'import multiprocessing\nmultiprocessing.set_forkserver_preload(["os", "megatron_fipo.room.a"])',
    ],
)
def test_cycles_inside_a_room(back: str, tmp_path: Path) -> None:
    """Every kind of import closes a cycle, wherever it is: lazy ones and those for type checkers as well."""
    root = _tree(tmp_path, room__a="from megatron_fipo.room.b import f\nx = 1\n", room__b=f"{back}\n")
    (found,) = problems(root, set(), set())
    assert found.startswith("import cycle: megatron_fipo.room.")
    assert {"megatron_fipo.room.a", "megatron_fipo.room.b"} < set(found.split())
    (root / "megatron_fipo" / "room" / "b.py").write_text("import os\n")
    assert problems(root, set(), set()) == []


def test_a_package_that_exports_its_modules(tmp_path: Path) -> None:
    """It may; a module that imports a name back from it is in a cycle."""
    exports = "from megatron_fipo.room.a import x"
    root = _tree(tmp_path, room____init__=exports, room__a="x = 1", room__b="from megatron_fipo.room import x")
    assert problems(root, set(), set()) == []
    (root / "megatron_fipo" / "room" / "a.py").write_text("x = 1\ndef f():\n    from megatron_fipo.room import x\n")
    (found,) = problems(root, set(), set())
    assert set(found.split()) == {"import", "cycle:", "<-", "megatron_fipo.room", "megatron_fipo.room.a"}


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("from megatron_fipo.room.a import _x", "megatron_fipo.room.a._x"),
        ("from megatron_fipo.room import a\na._x()", "megatron_fipo.room.a._x"),
        ("import megatron_fipo.room.a as b\nprint(b._x)", "megatron_fipo.room.a._x"),
    ],
)
def test_private_names_of_another_module(script: str, name: str, tmp_path: Path) -> None:
    """They are found in imports and as attributes of modules; a listed exception is accepted, and must be needed."""
    root = _tree(tmp_path, room__a="_x = print", docs=script)
    assert problems(root, set(), set()) == [f"docs/docs.py: {name} is private to its module"]
    assert problems(root, {f"docs/docs.py: {name}"}, set()) == []
    (root / "docs" / "docs.py").write_text("from megatron_fipo.room import a\nprint(a.__doc__)\n")
    expected = f"docs/docs.py: {name} is an exception that is not needed any more"
    assert problems(root, {f"docs/docs.py: {name}"}, set()) == [expected]


def test_lengths(tmp_path: Path) -> None:
    """Files of 400 lines and functions of 60, at any depth, are accepted, longer ones are not."""
    function = "class A:\n    def f(self):\n" + "        pass\n" * 59
    root = _tree(tmp_path, room__a="#\n" * 400, room__b=function)
    assert problems(root, set(), set()) == []
    _tree(tmp_path, room__a="#\n" * 401, room__b=function + "        pass\n")
    long = "megatron_fipo/room/b.py: f has 61 lines, the limit is 60"
    assert problems(root, set(), set()) == ["megatron_fipo/room/a.py has 401 lines, the limit is 400", long]
    assert problems(root, set(), {"megatron_fipo/room/a.py"}) == [long]
    _tree(tmp_path, room__a="", room__b="")
    expected = "megatron_fipo/room/a.py is an exception that is not needed any more"
    assert problems(root, set(), {"megatron_fipo/room/a.py"}) == [expected]
