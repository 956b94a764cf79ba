"""Facts of a setting, stated once, at its field: default, allowed values, resume rule and documentation.

    temperature: float = setting(1.0, "Sampling temperature in training", resume="fixed", above=0)

Validation (`problems`), the rules of resuming (`megatron_fipo.resume`), docs/configuration.md and `megatron-fipo
settings` read them from there. Allowed words are those of a field's `Literal` annotation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from operator import attrgetter
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

# What a resumed run may do with a setting: "free" settings may change, a change of a "fixed" one is another run.
Resume = Literal["free", "fixed"]

_FACTS, _SECTION = "facts", "section"
_sections: set[type] = set()
_Class = TypeVar("_Class", bound=type)


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts of a setting. Bounds hold for numbers and for each number of a list; null is always allowed.

    Attributes:
        doc: what it is, as in docs/configuration.md.
        resume: whether it may change when a run resumes.
        finite: infinity is not allowed; NaN never is.
    """

    doc: str
    resume: Resume
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    finite: bool = True

    def allow(self, number: float) -> bool:
        """Return whether a number is within the bounds."""
        return (
            number == number  # not NaN
            and not (self.finite and _is_infinite(number))
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    @property
    def bounds(self) -> str:
        """Bounds in words: "at least 0 and less than 1"; "finite" without any."""
        words = {"at least": self.at_least, "greater than": self.above, "at most": self.at_most}
        words["less than"] = self.below
        found = [f"{word} {number_text(bound)}" for word, bound in words.items() if bound is not None]
        return " and ".join(found) or "finite"


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting. `name`: dotted, as in overrides; `type`: its annotation, resolved."""

    name: str
    type: Any
    default: Any
    facts: Facts

    @property
    def choices(self) -> tuple[Any, ...]:
        """Values that a `Literal` annotation allows; empty without one."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    def problem(self, value: Any) -> str | None:
        """Return what is wrong with a value and what is allowed; None if nothing is."""
        if self.choices:
            return None if value in self.choices else f"{self.name} = {value!r} must be one of {_listed(self.choices)}"
        numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if type(v) in (int, float)]
        if all(self.facts.allow(number) for number in numbers):
            return None
        shown, each = (list(value), "each ") if isinstance(value, tuple) else (value, "")
        bounds, null = self.facts.bounds, ", or null" if type(None) in get_args(self.type) else ""
        if any(map(_is_infinite, numbers)) and bounds != "finite":
            bounds = f"finite and {bounds}"
        return f"{self.name} = {shown} must {each}be {bounds}{null}"


def setting(
    default: Any,
    doc: str,
    *,
    resume: Resume,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    finite: bool = True,
) -> Any:
    """Return the dataclass field of a setting; arguments as in `Facts`.

    Raises:
        ValueError: no doc, or an unknown resume rule.
    """
    if not doc or resume not in get_args(Resume):
        raise ValueError(
            f"a setting needs a doc and a resume rule, {_listed(get_args(Resume))}; got {doc!r}, {resume!r}"
        )
    metadata = {_FACTS: Facts(doc, resume, at_least, above, at_most, below, finite)}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def subsection(section_class: type) -> Any:
    """Return the dataclass field of a nested section, whose doc is the first line of the class's docstring.

    Raises:
        TypeError: the class is not a `section`.
    """
    if section_class not in _sections:
        raise TypeError(f"{section_class.__name__} must be declared with @section")
    doc = (section_class.__doc__ or section_class.__name__).strip().splitlines()[0]
    return dataclasses.field(default_factory=section_class, metadata={_SECTION: doc})


def section(cls: _Class) -> _Class:
    """Check that a dataclass states the facts of all of its fields.

    Raises:
        TypeError: a field is neither a `setting` nor a `subsection`.
    """
    for field in dataclasses.fields(cls):
        if not {_FACTS, _SECTION} & field.metadata.keys():
            raise TypeError(
                f"{cls.__name__}.{field.name} must be setting(default, doc, resume=...) or subsection(...): without "
                "a doc and a resume rule, a field cannot be a setting"
            )
    _sections.add(cls)
    return cls


def settings(cls: type) -> tuple[Setting, ...]:
    """Return all settings of a section, those of nested sections included, in their order."""
    return tuple(_settings(cls, ""))


def subsections(cls: type) -> dict[str, str]:
    """Return the doc of every section below this one by its dotted name, in their order."""
    hints, found = get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        if _SECTION in field.metadata:
            found[field.name] = field.metadata[_SECTION]
            inner = subsections(hints[field.name])
            found |= {f"{field.name}.{name}": doc for name, doc in inner.items()}
    return found


def value_of(node: Any, name: str) -> Any:
    """Return the value of a setting by its dotted name."""
    return attrgetter(name)(node)


def range_problems(node: Any, prefix: str = "") -> list[str]:
    """Return what is wrong with each value on its own; `prefix` goes before the names of `node`'s settings."""
    found = (dataclasses.replace(s, name=prefix + s.name).problem(value_of(node, s.name)) for s in settings(type(node)))
    return [problem for problem in found if problem]


def _settings(cls: type, prefix: str) -> Iterator[Setting]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if _SECTION in field.metadata:
            yield from _settings(hints[field.name], f"{prefix}{field.name}.")
            continue
        factory = field.default_factory
        default = factory() if callable(factory) else field.default
        yield Setting(prefix + field.name, hints[field.name], default, field.metadata[_FACTS])


def _is_infinite(number: float) -> bool:
    return number in (math.inf, -math.inf)  # math.isinf raises OverflowError for large integers


def number_text(number: float) -> str:
    """Return a bound as text, all digits of an integer."""
    return str(number) if isinstance(number, int) else f"{number:g}"


def _listed(words: tuple[Any, ...]) -> str:
    return ", ".join(map(str, words))
