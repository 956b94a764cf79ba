"""Write the longest tests of the last `make test` into the table of docs/development.md.

python -m tests.durations [RESULTS] [PAGE]
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "build" / "test.xml", ROOT / "docs" / "development.md"
LONGEST = 25
BEGIN, END = "<!-- durations -->\n", "<!-- end of durations -->\n"


def table(results: Path) -> str:
    """Return a Markdown table of the longest tests, fixtures included, from pytest's JUnit XML file."""
    cases = list(ElementTree.parse(results).iter("testcase"))
    longest = sorted(cases, key=lambda case: -float(case.attrib["time"]))[:LONGEST]
    seconds = sum(float(case.attrib["time"]) for case in cases)
    lines = [f"{len(cases):,} tests, {seconds:.0f} s of tests in all. The {len(longest)} longest:", ""]
    lines += ["| seconds | test |", "|---:|---|"]
    lines += [f"| {float(case.attrib['time']):.1f} | `{_name(case)}` |" for case in longest]
    return "\n".join(lines) + "\n"


def _name(case: ElementTree.Element) -> str:
    return f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name']}"


def rewrite(page: Path, text: str) -> None:
    """Put `text` between the page's two markers.

    Raises:
        ValueError: a marker is missing.
    """
    content = page.read_text()
    if BEGIN not in content or END not in content:
        raise ValueError(f"{page} must have a line {BEGIN.strip()!r} and below it a line {END.strip()!r}")
    before, _, rest = content.partition(BEGIN)
    page.write_text(before + BEGIN + text + END + rest.partition(END)[2])


if __name__ == "__main__":
    paths = [Path(argument) for argument in sys.argv[1:]]
    results, page = (paths + [RESULTS, PAGE][len(paths) :])[:2]
    rewrite(page, table(results))
