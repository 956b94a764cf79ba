"""Generated pages are up to date; links, anchors and files that pages name exist; the status table has its tests."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.markdown import NAMES, PAGES, ROOT, anchors, blocks, generator, links, prose

pages = generator()
STATES = {"yes", "in part", "ran once", "written, not run"}
MARKERS = {
    text.split(":")[0]
    for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
}
FOLDERS = "benchmarks|csrc|docs|examples|megatron_fipo|slurm|tests"
MADE_BY_THE_READER = {"docs/site"}


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs" / "configuration.md", ROOT / "docs" / "metrics.md"])
def test_generated_pages_are_up_to_date(path: Path) -> None:
    """`make docs-pages` would change nothing."""
    assert pages.pages()[path] == path.read_text()


def test_readme_is_short() -> None:
    """At most 6 kB."""
    assert len((ROOT / "README.md").read_bytes()) <= 6000


@pytest.mark.parametrize("row", pages.status(), ids=lambda row: row["feature"])
def test_status_names_its_tests(row: dict[str, Any]) -> None:
    """The states are known ones; files and markers exist; a claim has tests, and one about a GPU has tests for GPUs."""
    assert row.keys() == {"feature", "cpu", "gpu"}
    for where in ("cpu", "gpu"):
        cell = row[where]
        assert cell.keys() <= {"state", "note", "tests"}
        assert cell["state"] in STATES
        for test in cell["tests"]:
            if test.startswith("marker:"):
                assert test.removeprefix("marker:") in MARKERS
            else:
                assert (ROOT / test).exists(), test
                assert list((ROOT / test).rglob("test_*.py")) or Path(test).name.startswith("test_"), test
        if cell["state"] != "written, not run":
            assert cell["tests"]
        if where == "gpu":
            assert all(test == "marker:gpu" or test.startswith("tests/gpu/") for test in cell["tests"])


@pytest.mark.parametrize("page", NAMES)
def test_links(page: str) -> None:
    """Every relative link leads to a file of the repository, and to a heading where it names one."""
    broken = []
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(str(target.resolve().relative_to(ROOT)))):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", NAMES)
def test_named_files_exist(page: str) -> None:
    """Every file of the repository that the page names."""
    text = (ROOT / page).read_text()
    named = set(re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w./-]*\w", text)) - MADE_BY_THE_READER
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


@pytest.mark.parametrize("page", NAMES)
def test_make_targets_exist(page: str) -> None:
    """Every target that a command or the text names."""
    known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join([*re.findall(r"`(make [\w-]+)", prose(page)), *(b.text for b in blocks(page))])
    assert set(re.findall(r"^make ([a-z][\w-]*)", text, re.MULTILINE)) <= known


def test_contents() -> None:
    """index.md and the site's navigation have every page."""
    expected = {page.name for page in PAGES if page.parent == ROOT / "docs"} - {"index.md"}
    assert set(links("docs/index.md")) - {"https://arxiv.org/abs/2603.19835"} == expected
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    parts = [entry for part in site["nav"] for entry in part.values()]
    in_nav = [page for part in parts for page in ([part] if isinstance(part, str) else part)]
    assert sorted(in_nav) == sorted(expected | {"index.md"})
