"""Settings in words, for docs/configuration.md and `megatron-fipo settings`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any, get_args, get_origin

from megatron_fipo.config.sections import Config
from megatron_fipo.config.setting import Facts, Setting, number_text, settings, subsections

_WORDS = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "any value"}
_ELEMENTS = {str: "list of text", int: "list of integers"}


def type_text(setting: Setting) -> str:
    """Return what a setting's value may be, in the words of YAML: "integer >= 1 or null"."""
    if setting.choices:
        return " or ".join(map(str, setting.choices))
    arguments = get_args(setting.type)
    parts = arguments if type(None) in arguments else (setting.type,)
    return " or ".join(_part(part, setting.facts) for part in parts)


def default_text(setting: Setting) -> str:
    """Return a setting's default as it would be written in YAML."""
    value = setting.default
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def describe(name: str | None = None, config: type = Config) -> list[str]:
    """Return lines about one setting or all settings of a section; without a name, the sections.

    Raises:
        ValueError: an unknown name; the message suggests the nearest known one.
    """
    sections, known = subsections(config), {s.name: s for s in settings(config)}
    if name is None:
        return _columns([(section, doc) for section, doc in sections.items()])
    if name in known:
        return _described(known[name])
    if name not in sections:
        nearest = difflib.get_close_matches(name, [*sections, *known], n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; sections are {', '.join(sections)}"
        raise ValueError(f"unknown setting or section {name!r}{hint}")
    return [line for key, setting in known.items() if key.startswith(f"{name}.") for line in _described(setting)]


def _described(setting: Setting) -> list[str]:
    resume = "free" if setting.facts.resume == "free" else "fixed when a run resumes"
    return [f"{setting.name} = {default_text(setting)}   ({type_text(setting)}; {resume})", f"    {setting.facts.doc}"]


def _columns(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(left) for left, _ in rows)
    return [f"{left:{width}}  {right}" for left, right in rows]


def _part(part: Any, facts: Facts) -> str:
    if get_origin(part) is tuple:
        first, second = get_args(part)
        words = _ELEMENTS[first] if second is Ellipsis else f"two {_WORDS[first]}s"
        return words + _bounds(facts) if first is not str else words
    if get_origin(part) is dict:
        return "mapping"
    return _WORDS[part] + (_bounds(facts) if part in (int, float) else "")


def _bounds(facts: Facts) -> str:
    """Return " >= 1", " > 0", " in [0, 1)", or nothing."""
    lower = facts.at_least if facts.at_least is not None else facts.above
    upper = facts.at_most if facts.at_most is not None else facts.below
    if lower is not None and upper is not None:
        ends = "[" if facts.at_least is not None else "(", "]" if facts.at_most is not None else ")"
        return f" in {ends[0]}{number_text(lower)}, {number_text(upper)}{ends[1]}"
    if lower is not None:
        return f" {'>=' if facts.at_least is not None else '>'} {number_text(lower)}"
    if upper is not None:
        return f" {'<=' if facts.at_most is not None else '<'} {number_text(upper)}"
    return ""
