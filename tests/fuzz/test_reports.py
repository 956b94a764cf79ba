"""Reports of made-up runs and studies: a page or an error; no markup, script or control character gets through."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_fipo.config import Config, to_yaml
from megatron_fipo.printable import printable
from megatron_fipo.report import credit, page, scaling_page
from megatron_fipo.report.page import write_report
from megatron_fipo.report.parts import document, figure_text, table, terminal_text
from megatron_fipo.report.scaling_page import write_scaling_report
from megatron_fipo.run_log import RunLog
from tests.fuzz.inputs import PAYLOAD, changed, json_values, numbers, refusal, texts
from tests.report.test_report import metric_names, rows_of, summary_of
from tests.support.studies import make_row, write_study

pytestmark = pytest.mark.slow  # two minutes for all targets

CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f]")
SETTINGS = ("run.name", "trainer.max_steps", "eval.samples", "rollout.group_size", "data.validation", "model.hf_path")
quick = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
few = settings(max_examples=1, suppress_health_check=[HealthCheck.function_scoped_fixture])

configs = st.dictionaries(st.sampled_from(SETTINGS), json_values, max_size=3)
rows = st.lists(st.dictionaries(st.sampled_from([*metric_names(), "step"]), numbers, max_size=5), max_size=3)
summaries = changed(summary_of({"avg@k": 0.1}, {"avg@k": 0.2}))


def _said(write: Callable[[], str]) -> str | None:
    """Return the output of a report; None: its input was refused, in words of this package."""
    said: list[str] = []
    problem = refusal(lambda: said.append(write()))
    assert problem is None or problem.startswith("ValueError: ")
    return said[0] if said else None


def _check_run(directory: Path, given_rows: list[dict[str, Any]], summary: Any, config: dict[str, Any]) -> None:
    directory.mkdir(exist_ok=True)
    lines = [json.dumps({"step": i + 1, **row}) for i, row in enumerate(given_rows)]
    (directory / "metrics.jsonl").write_text("\n".join([*(json.dumps(row) for row in rows_of(2)), *lines]) + "\n")
    (directory / "summary.json").write_text(json.dumps(summary))
    content: dict[str, dict[str, Any]] = {}
    for key, value in config.items():
        section, name = key.split(".")
        content.setdefault(section, {})[name] = value
    (directory / "config.yaml").write_text(json.dumps(content) if content else to_yaml(Config()))
    said = _said(lambda: write_report(directory))
    if said is None:
        return
    assert not CONTROL.search(said)
    assert PAYLOAD not in (directory / "report.html").read_text(errors="replace")


@quick
@given(rows, summaries, configs)
@example([], {}, {"trainer.max_steps": PAYLOAD, "run.name": "\x1b[31m"})
@example([{"wall_seconds": 1e308, "step": 3}], {}, {})
def test_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_rows: Any, summary: Any, config: dict[str, Any]
) -> None:
    """Rows, summary and config of any kind, without their figures."""
    monkeypatch.setattr(page, "_draw", lambda *arguments: None)
    _check_run(tmp_path / "run", given_rows, summary, config)


@few
@given(rows, summaries, configs)
@example([], {}, {"run.name": "$\\foo$"})
def test_figures(tmp_path: Path, given_rows: Any, summary: Any, config: dict[str, Any]) -> None:
    """The same with figures, which take seconds."""
    _check_run(tmp_path / "run", given_rows, summary, config)


ROW = make_row()


def _check_study(directory: Path, given_rows: list[dict[str, Any]]) -> None:
    study = write_study(directory, *({**row, "name": f"row{i}"} for i, row in enumerate(given_rows)))
    named = [*given_rows, {**ROW, "name": PAYLOAD}]
    (study / "rows" / "named.json").write_text(json.dumps(named[-1]))
    (study / "rows" / "any.json").write_text(json.dumps(named[0]))
    said = _said(lambda: write_scaling_report(study))
    if said is None:
        return
    assert not CONTROL.search(said)
    assert PAYLOAD not in (study / "report.html").read_text(errors="replace")


@quick
@given(st.lists(changed(ROW), min_size=1, max_size=2))
def test_scaling_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_rows: list[dict[str, Any]]) -> None:
    """Rows of a study of any kind, without their figures."""
    monkeypatch.setattr(scaling_page, "_write_figures", lambda study: scaling_page._Drawn({}, []))
    _check_study(tmp_path, given_rows)


@few
@given(st.lists(changed(ROW), min_size=1, max_size=2))
@example(
    [
        {
            **ROW,
            "seconds": 1e308,
            "model": "$\\foo$",
            "timeline": {"chunks": 1, "stages": ROW["timeline"]["stages"] * 1000},
        },
        {**ROW, "stages": [dict(ROW["stages"][0], stage=i) for i in range(2000)]},
    ]
)
def test_scaling_figures(tmp_path: Path, given_rows: list[dict[str, Any]]) -> None:
    """The same with figures."""
    _check_study(tmp_path, given_rows)


@settings(max_examples=150)
@given(st.recursive(st.text(st.characters()) | st.integers() | st.booleans() | st.none(), st.lists, max_leaves=6))
def test_inline_data(value: Any) -> None:
    """Data in a page comes back as it was, and cannot end the element that it is in."""
    text = credit._inline(value)
    assert json.loads(text) == value
    assert not re.search("[<>&\u2028\u2029]", text)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts, st.text(st.characters(), max_size=30))
def test_terminal_texts(capsys: Any, name: str, text: str) -> None:
    """Tables, notes and warnings: no control character but the line feed, and no error."""
    log = RunLog(Config(), rank=0, enabled=False)
    log.note(name + text)
    log.warn(text)
    shown = terminal_text(name, text) + capsys.readouterr().out + printable(name)
    assert not CONTROL.search(shown)
    shown.encode()


@settings(max_examples=100)
@given(texts, texts)
def test_texts_of_pages(name: str, text: str) -> None:
    """Titles and tables hold any text, none of it as markup; figures take no text for TeX."""
    html = document(name, table([name], [[text, name]]))
    assert PAYLOAD not in html
    assert "</script>" not in html
    assert figure_text(text).count("$") == figure_text(text).count(r"\$")
