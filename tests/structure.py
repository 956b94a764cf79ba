"""Structure of the code that ruff and mypy do not check: import cycles, private imports, long files and functions.

python -m tests.structure    (`make lint` runs it)
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = "megatron_fipo"
FILE_LINES, FUNCTION_LINES = 400, 60
IMPORTING_CALLS = {"import_module", "set_forkserver_preload"}
# Each exception must be needed, so that a list only shrinks.
PRIVATE_IMPORTS: set[str] = set()
LONG_FILES: set[str] = set()


class Import(NamedTuple):
    """One imported name; `alias`: what it is called in the file, None for a module that is imported by a call."""

    line: int
    name: str
    alias: str | None


def imports(tree: ast.AST, package: list[str]) -> Iterator[Import]:
    """Yield all imports, those inside functions, classes and `if TYPE_CHECKING` included.

    Strings that importlib or a fork server are told to import count as well.

    Args:
        package: names of the package that the file is in, from the top.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (Import(node.lineno, a.name, a.asname or a.name.split(".")[0]) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (Import(node.lineno, f"{module}.{a.name}", a.asname or a.name) for a in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in IMPORTING_CALLS:
            strings = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))
            yield from (Import(node.lineno, name, None) for name in strings)


def python_files(root: Path, *folders: str) -> Iterator[Path]:
    """Yield Python files, sorted, without those that are built or installed."""
    for folder in folders:
        yield from sorted((root / folder).rglob("*.py"))


def package_of(file: Path, root: Path) -> list[str]:
    return list(file.relative_to(root).parent.parts)


def module_of(file: Path, root: Path) -> str:
    return ".".join([*package_of(file, root), *([file.stem] if file.stem != "__init__" else [])])


def import_graph(root: Path, *folders: str) -> dict[str, set[str]]:
    """Return the modules that each module of these folders imports.

    Importing `a.b` also runs the `__init__` of `a`, which is not counted: an `__init__` that exports names of its own
    modules would be in a cycle with each of them.
    """
    files = {module_of(file, root): file for file in python_files(root, *folders)}
    graph: dict[str, set[str]] = {}
    for module, file in files.items():
        found = imports(ast.parse(file.read_text()), package_of(file, root))
        # `from a import b` imports the module a.b, or else a name of the module a.
        targets = (name if name in files or alias is None else name.rpartition(".")[0] for _, name, alias in found)
        graph[module] = {target for target in targets if target in files and target != module}
    return graph


def cycle(graph: Mapping[str, set[str]]) -> str | None:
    """Return an import cycle; None if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return "import cycle: " + " <- ".join(error.args[1])
    return None


def private_imports(file: Path, root: Path, modules: set[str]) -> Iterator[str]:
    """Yield private names of other modules that a file imports, or reads from a module that it has imported."""
    tree, where = ast.parse(file.read_text()), file.relative_to(root)
    aliases: dict[str, str] = {}
    for found in imports(tree, package_of(file, root)):
        if found.name in modules and found.alias is not None:
            aliases[found.alias] = found.name
        module, _, name = found.name.rpartition(".")
        if found.alias is not None and module in modules and _is_private(name):
            yield f"{where}: {found.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and _is_private(node.attr):
            module = aliases.get(node.value.id)
            if module is not None and f"{module}.{node.attr}" not in modules:
                yield f"{where}: {module}.{node.attr}"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def long_functions(file: Path, root: Path) -> Iterator[str]:
    """Yield functions of more than `FUNCTION_LINES` lines, decorators not counted."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{file.relative_to(root)}: {node.name} has {lines} lines, the limit is {FUNCTION_LINES}"


def problems(root: Path, private: set[str], long_files: set[str]) -> list[str]:
    """Return all problems of a tree.

    Args:
        private: exceptions, as `private_imports` names them.
        long_files: paths of files that may be longer than `FILE_LINES`.
    """
    graphs = [import_graph(root, PACKAGE), import_graph(root, "tests")]
    found = [text for graph in graphs if (text := cycle(graph)) is not None]
    modules = {module for module in graphs[0] if module != PACKAGE}
    files = list(python_files(root, PACKAGE, "docs", "benchmarks", "examples"))
    used = [name for file in files for name in private_imports(file, root, modules)]
    found += [f"{name} is private to its module" for name in used if name not in private]
    found += [f"{name} is an exception that is not needed any more" for name in sorted(private - set(used))]
    package = list(python_files(root, PACKAGE))
    lengths = {str(file.relative_to(root)): len(file.read_text().splitlines()) for file in package}
    long = {file for file, lines in lengths.items() if lines > FILE_LINES}
    found += [f"{name} has {lengths[name]} lines, the limit is {FILE_LINES}" for name in sorted(long - long_files)]
    found += [f"{name} is an exception that is not needed any more" for name in sorted(long_files - long)]
    return found + [text for file in package for text in long_functions(file, root)]


if __name__ == "__main__":
    lines = problems(ROOT, PRIVATE_IMPORTS, LONG_FILES)
    print("\n".join(lines) or "structure: no problems")
    sys.exit(bool(lines))
