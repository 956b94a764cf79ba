"""A setting's facts are stated at its field, and everything else follows from them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from typer.testing import CliRunner

from megatron_fipo.cli import app
from megatron_fipo.config import Config, RolloutConfig, load, load_config
from megatron_fipo.config.describe import default_text, describe, type_text
from megatron_fipo.config.setting import range_problems, section, setting, settings, subsection
from megatron_fipo.resume import differences
from tests.support.markdown import generator


@section
@dataclass(frozen=True)
class LargerRolloutConfig(RolloutConfig):
    """The rollout settings and two more."""

    min_p: float = setting(0.0, "Smallest probability relative to the largest", resume="fixed", at_least=0, below=1)
    retries: int | None = setting(3, "Retries of a request; null: no limit", resume="free", at_least=0)


@section
@dataclass(frozen=True)
class LargerConfig(Config):
    """The configuration with these rollout settings."""

    rollout: LargerRolloutConfig = subsection(LargerRolloutConfig)


@section
@dataclass(frozen=True)
class Example:
    """Every kind of setting."""

    word: str = setting("a", "Word", resume="free")
    choice: Literal["a", "b"] = setting("a", "Choice", resume="free")
    switch: bool | None = setting(None, "Switch", resume="free")
    half_open: float = setting(0.5, "Half-open", resume="free", above=0, at_most=1)
    most: int = setting(1, "Most", resume="free", below=5)
    pair: tuple[float, float] | None = setting((1e-8, 1.0), "Pair", resume="free", at_least=0)
    names: tuple[str, ...] = setting((), "Names", resume="free")
    counts: tuple[int, ...] = setting((1, 2), "Counts", resume="free", at_least=1)
    unbounded: float = setting(1e-8, "Unbounded", resume="free")
    maybe_infinite: float = setting(1.0, "Maybe infinite", resume="free", above=0, finite=False)
    large: int = setting(1, "Large", resume="free", at_most=2**32 - 1)
    mapping: dict[str, Any] = setting({}, "Mapping", resume="free")


def test_one_field_makes_a_setting(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field of a copy of the dataclass is loaded, validated, compared on resuming and documented."""
    monkeypatch.setattr(load, "Config", LargerConfig)
    config: Any = load_config(file, ["rollout.min_p=0.25"])
    assert config.rollout.min_p == 0.25
    with pytest.raises(ValueError, match=r"rollout\.min_p = 1\.0 must be at least 0 and less than 1"):
        load_config(file, ["rollout.min_p=1"])
    with pytest.raises(ValueError, match=r"rollout\.min_p: expected number in \[0, 1\), got 'low'"):
        load_config(file, ["rollout.min_p=low"])
    with pytest.raises(ValueError, match=r"did you mean 'rollout\.min_p'\?"):
        load_config(file, ["rollout.minp=0.1"])

    assert differences(load_config(file), config) == ["rollout.min_p: 0.0 -> 0.25"]
    assert differences(load_config(file), load_config(file, ["rollout.retries=9"])) == []

    page = generator().configuration(LargerConfig)
    assert "| `min_p` | number in [0, 1) | `0.0` |  | Smallest probability relative to the largest |" in page
    assert "| `retries` | integer >= 0 or `null` | `3` | yes | Retries of a request; null: no limit |" in page
    assert describe("rollout.min_p", LargerConfig) == [
        "rollout.min_p = 0.0   (number in [0, 1); fixed when a run resumes)",
        "    Smallest probability relative to the largest",
    ]


def test_a_field_without_facts_is_impossible() -> None:
    """A plain default, a missing resume rule, an unknown one, no doc, a section that was not checked."""

    @dataclass(frozen=True)
    class Plain:
        limit: int = 3

    with pytest.raises(TypeError, match=r"Plain\.limit must be setting\(default, doc, resume=\.\.\.\)"):
        section(Plain)
    with pytest.raises(TypeError, match="Plain must be declared with @section"):
        subsection(Plain)
    with pytest.raises(TypeError, match="resume"):
        setting(3, "Limit")  # type: ignore[call-arg]
    for doc, rule in (("Limit", "maybe"), ("", "free")):
        with pytest.raises(ValueError, match="a setting needs a doc and a resume rule, free, fixed"):
            setting(3, doc, resume=rule)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"choice": "c"}, "choice = 'c' must be one of a, b"),
        ({"half_open": 1.0}, None),
        ({"half_open": 0.0}, "half_open = 0.0 must be greater than 0 and at most 1"),
        ({"most": 4}, None),
        ({"most": 5}, "most = 5 must be less than 5"),
        ({"pair": None}, None),
        ({"pair": (0.0, -1.0)}, "pair = [0.0, -1.0] must each be at least 0, or null"),
        ({"counts": ()}, None),
        ({"counts": (1, 0)}, "counts = [1, 0] must each be at least 1"),
        ({"unbounded": -1e300}, None),
        ({"unbounded": math.nan}, "unbounded = nan must be finite"),
        ({"unbounded": -math.inf}, "unbounded = -inf must be finite"),
        ({"half_open": math.inf}, "half_open = inf must be finite and greater than 0 and at most 1"),
        ({"maybe_infinite": math.inf}, None),
        ({"maybe_infinite": math.nan}, "maybe_infinite = nan must be greater than 0"),
        ({"large": 10**400}, f"large = {10**400} must be at most 4294967295"),
        ({"large": 2**32}, "large = 4294967296 must be at most 4294967295"),
    ],
)
def test_ranges(changes: dict[str, Any], problem: str | None) -> None:
    """Bounds belong to their range or not, as stated; every number of a list is checked."""
    expected = [] if problem is None else [f"section.{problem}"]
    assert range_problems(dataclasses.replace(Example(), **changes), "section.") == expected


def test_types_and_defaults_in_words() -> None:
    """Settings are described as in docs/configuration.md."""
    assert {s.name: (type_text(s), default_text(s)) for s in settings(Example)} == {
        "word": ("text", '"a"'),
        "choice": ("a or b", '"a"'),
        "switch": ("true or false or null", "null"),
        "half_open": ("number in (0, 1]", "0.5"),
        "most": ("integer < 5", "1"),
        "pair": ("two numbers >= 0 or null", "[1e-08, 1.0]"),
        "names": ("list of text", "[]"),
        "counts": ("list of integers >= 1", "[1, 2]"),
        "unbounded": ("number", "1e-8"),
        "maybe_infinite": ("number > 0", "1.0"),
        "large": ("integer <= 4294967295", "1"),
        "mapping": ("mapping", "{}"),
    }


def test_mappings_are_not_shared() -> None:
    """Each config has its own."""
    first, second = Example(), Example()
    first.mapping["a"] = 1
    assert second.mapping == {}


def test_descriptions() -> None:
    """Describe the sections, a section with its subsections, and the nearest name of an unknown one."""
    names = [line.split()[0] for line in describe()]
    assert names[:5] == ["run", "model", "moe", "parallel", "data"]
    assert names[5:8] == ["rollout", "rollout.server", "rollout.correction"]
    lines = describe("rollout")
    assert len(lines) == 2 * sum(s.name.startswith("rollout.") for s in settings(Config))
    assert "rollout.server.count = null   (integer >= 1 or null; free)" in lines
    with pytest.raises(
        ValueError, match=r"unknown setting or section 'rollout\.servr'; did you mean 'rollout\.server'"
    ):
        describe("rollout.servr")


def test_settings_command() -> None:
    """Prints the lines of `describe`; an unknown name is a ValueError, which `main` turns into exit code 2."""
    shown = CliRunner().invoke(app, ["settings", "rollout.correction"])
    assert shown.exit_code == 0
    assert shown.stdout.splitlines() == describe("rollout.correction")
    assert isinstance(CliRunner().invoke(app, ["settings", "rolout"]).exception, ValueError)
