"""Inputs that several targets share: JSON of any kind, hostile texts, payloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

PAYLOAD = "<img src=x onerror=alert(1)>"
HOSTILE = (
    PAYLOAD,
    "</script>",
    "\x1b[31m",
    "[/]",
    "[bold]",
    "${oc.env:SECRET}",
    "$\\foo$",
    "../x",
    "\x00",
    "\ud800",
    "\u202e",
)

texts = st.one_of(st.text(max_size=20), st.sampled_from(HOSTILE), st.text(st.characters(), max_size=5))
numbers = st.one_of(
    st.integers(), st.sampled_from([0, -1, 1 << 63, 10**400, 2000]), st.floats(), st.sampled_from([1e308, 5e-324])
)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
json_values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)


def changed(fields: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """An object with some of its fields replaced by anything, or left out."""
    changes = st.dictionaries(st.sampled_from(sorted(fields)), json_values, max_size=3)
    missing = st.sets(st.sampled_from(sorted(fields)), max_size=1)
    return st.builds(lambda new, gone: {k: v for k, v in (fields | new).items() if k not in gone}, changes, missing)


class Deep(str):
    """JSON that is nested more deeply than Python calls functions."""

    __slots__ = ()

    def __new__(cls) -> Deep:
        return super().__new__(cls, "[" * 100_000 + "]" * 100_000)

    def __repr__(self) -> str:
        return "Deep()"


def refusal(read: Callable[[], object]) -> str | None:
    """Return the message of the ValueError with which an input is refused; None: it was taken."""
    try:
        read()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return None
