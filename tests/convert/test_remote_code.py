"""Code beside a checkpoint's weights, which transformers offers to run, is refused."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import megatron_fipo

PACKAGE = Path(megatron_fipo.__file__).parent


def _calls() -> Iterator[tuple[str, ast.Call]]:
    """(file, call) of every `from_pretrained`."""
    for file in sorted(PACKAGE.rglob("*.py")):
        name = str(file.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                yield name, node


def test_remote_code_is_refused() -> None:
    """Every caller says `trust_remote_code=False`: without it transformers asks at the terminal."""
    given = [(file, {k.arg: ast.unparse(k.value) for k in call.keywords}) for file, call in _calls()]
    assert {file for file, _ in given} == {"convert/logits.py", "model/architecture.py", "model/stop_tokens.py"}
    assert [file for file, keywords in given if keywords.get("trust_remote_code") != "False"] == []
