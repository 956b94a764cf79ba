"""`megatron-fipo scaling report`: what a study's rows say, on a page, in figures and in the terminal."""

from __future__ import annotations

import base64
import csv
import itertools
import json
import random
import re
import sys
import time
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo import cli
from megatron_fipo.report import scaling_findings as findings
from megatron_fipo.report.scaling_page import write_scaling_report
from megatron_fipo.scaling.cost.layout import COUNTS, END_STAGES
from megatron_fipo.scaling.measure.row_reader import MeasuredRow, parse_row
from tests.support.studies import lost, make_row, write_study

ALL = ("bubble", "causes", "losses", "mfu", "predicted_memory", "predicted_time", "scaling")


def _rows(*contents: dict[str, Any]) -> list[MeasuredRow]:
    return [parse_row(content)[0] for content in contents]


def _sweep(**changes: Any) -> list[dict[str, Any]]:
    shapes = itertools.product((8, 16), ((1, 1), (2, 1), (2, 2), (4, 1)))
    return [make_row(g, p, v, 8, **changes) for g, (p, v) in shapes]


def _figures(study: Path) -> list[str]:
    return sorted(f.stem for f in (study / "figures").iterdir())


def _cells(page: str) -> list[list[str]]:
    lines = re.findall(r"<tr>(.*?)</tr>", page)
    return [[unescape(re.sub("<.*?>", "", c)) for c in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", line)] for line in lines]


def test_best_layouts_by_brute_force() -> None:
    """In 200 random rows nobody of the same setting and GPUs is faster, and efficiency is to the fewest GPUs' best."""
    random.seed(1)
    contents = []
    for i in range(200):
        where = {"loss": random.choice(["fipo", "lm"]), "model": random.choice(["a", "b"]), "name": f"row-{i}"}
        rate = random.choice([100.0, 200.0, 300.0, None, 400.0])
        row = make_row(random.choice([8, 16, 64]), **where, tokens_per_second_per_gpu=rate)
        contents.append(row if random.random() < 0.8 else lost(row, "failed", "no"))
    rows = _rows(*contents)
    found = {(b.row.setting, b.row.layout.gpus): b for b in findings.best_layouts(rows)}
    for setting in itertools.product("ab", ["H100-80"], ["fipo", "lm"]):
        rates = {
            gpus: [r.tokens_per_second_per_gpu for r in rows if r.setting == setting and r.layout.gpus == gpus and r.ok]
            for gpus in (8, 16, 64)
        }
        known = {gpus: [x for x in xs if x is not None] for gpus, xs in rates.items()}
        for gpus, xs in known.items():
            assert found[setting, gpus].row.tokens_per_second_per_gpu == max(xs)
            assert found[setting, gpus].others == len(xs) - 1
            assert found[setting, gpus].efficiency == max(xs) / max(known[8])


def test_shown_timelines() -> None:
    """The fastest and slowest, and the fastest of each number of stages, once each."""
    rates = {"a": (1, 5.0), "b": (2, 9.0), "c": (2, 8.0), "d": (4, 3.0), "e": (4, 2.0), "f": (4, 2.5)}
    rows = _rows(*(make_row(8, p, name=n, tokens_per_second_per_gpu=rate) for n, (p, rate) in rates.items()))
    assert [r.name for r in findings.shown_timelines(rows)] == ["b", "a", "d", "e"]


def test_losses_are_paired_by_layout() -> None:
    """The same layout and tokens under both losses; a lone one has no partner."""
    rows = _rows(
        make_row(seconds=3.0), make_row(loss="lm", seconds=2.0), make_row(8, 4), make_row(8, 1, loss="lm", tokens=5)
    )
    assert [(p.fipo.layout.parallel.pipeline, p.ratio) for p in findings.loss_pairs(rows)] == [(2, 1.5)]


def test_page_has_the_rows_numbers(tmp_path: Path) -> None:
    """Each row's line: its time, rate, MFU, bubble, memory and predictions, rounded; and the best ones' efficiency."""
    contents = _sweep(timeline=None)
    write_scaling_report(write_study(tmp_path, *contents))
    cells = _cells((tmp_path / "report.html").read_text())
    for c in contents:
        (line,) = (x for x in cells if len(x) == 18 and x[0] == str(c["gpus"]) and x[1] == _layout(c))
        assert line[2:7] == ["small", "H100-80", "fipo", "4,096", "8"]
        assert line[7] == f"{c['seconds']:.3g}"
        assert line[8] == f"{c['tokens_per_second_per_gpu']:,.0f}"
        assert line[9:12] == [f"{c['mfu']:.1%}", f"{c['bubble_fraction']:.1%}", "40"]
        assert line[12:14] == [f"{c['closed_form_bubble_fraction']:.1%}", f"{c['predicted']['seconds']:.3g}"]
        assert line[14:17] == [f"{c['predicted']['bubble_fraction']:.1%}", "42", "ok"]
    best = [x for x in cells if len(x) == 10][1:]
    assert [(x[0], x[-2]) for x in best] == [("8", "100.0%"), ("16", "100.0%")]


def _layout(content: dict[str, Any]) -> str:
    return _rows(content)[0].layout.label


def test_terminal_table_has_the_rows_numbers(tmp_path: Path) -> None:
    """At most 100 columns; the best of each number of GPUs has a star."""
    contents = _sweep(timeline=None)
    text = write_scaling_report(write_study(tmp_path, *contents))
    assert max(len(line) for line in text.splitlines() if not line.startswith(("warning", "report"))) <= 100
    for c in contents:
        numbers = [f"{c['seconds']:.3g}", f"{c['tokens_per_second_per_gpu']:,.0f}", f"{c['mfu']:.1%}"]
        pattern = rf"^ +{c['gpus']}\*? +{_layout(c)} +4,096 +" + " +".join(map(re.escape, numbers))
        assert len(re.findall(pattern, text, re.MULTILINE)) == 1
    assert re.findall(r"(\d+)\* +(TP\d PP\d)", text) == [("8", "TP1 PP1"), ("16", "TP1 PP1")]
    assert "8 measured, 0 out of memory, 0 failed; error of predicted times: 5.0% (median of 8)" in text


def test_mixed_rows(tmp_path: Path) -> None:
    """Lost ones are lines with the memory reached and the error; several models, losses; the plan's rest is listed."""
    oom = lost(make_row(64, 1), "out_of_memory", "CUDA out of memory")
    failed = lost(make_row(64, 2), "failed", "rank 3: lost")
    contents = [*_sweep(), make_row(loss="lm"), make_row(8, 1, model="other", name="other"), oom, failed]
    _write_plan(tmp_path, [*contents[:2], make_row(128, 4, 2)])
    text = write_scaling_report(write_study(tmp_path, *contents))
    assert "10 measured, 1 out of memory, 1 failed; 1 of the plan's 3 layouts not measured yet" in text
    assert "not measured yet: 128 GPUs, TP1 PP4 VPP2, 4,096 tokens" in text
    page = (tmp_path / "report.html").read_text()
    lines = {x[-2]: x[11] for x in _cells(page) if len(x) == 18 and x[0] == "64"}
    assert lines == {"out of memory: CUDA out of memory": "84.5", "failed: rank 3: lost": "84.5"}
    assert "<li>128 GPUs, TP1 PP4 VPP2, 4,096 tokens</li>" in page
    assert [f for f in _figures(tmp_path) if not f.startswith("timeline")] == list(ALL)


def _write_plan(study: Path, contents: list[dict[str, Any]]) -> None:
    with (study / "plan.csv").open("w") as file:
        writer = csv.DictWriter(file, (*COUNTS, *END_STAGES, "recompute"), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(contents)


def test_a_damaged_plan_is_named(tmp_path: Path) -> None:
    """The rows are reported all the same."""
    study = write_study(tmp_path, *_sweep())
    (study / "plan.csv").write_text("gpus,tensor\n8,x\n")
    text = write_scaling_report(study)
    assert f"warning: line 1 of {study / 'plan.csv'}: tensor must be an integer of at least 1, got 'x'" in text
    assert f"{len(_sweep())} measured" in text


def test_figures_without_data_are_left_out(tmp_path: Path) -> None:
    """One layout without pipeline or prediction has only its MFU; a lost one nothing; old figures go."""
    study = write_study(tmp_path, *_sweep())
    write_scaling_report(study)
    for file in (study / "rows").iterdir():
        file.unlink()
    write_scaling_report(write_study(study, make_row(8, 1, predicted=None, timeline=None)))
    assert _figures(study) == ["mfu"]
    for file in (study / "rows").iterdir():
        file.unlink()
    write_scaling_report(write_study(study, lost(make_row(8, 1, predicted=None), "failed", "no")))
    assert _figures(study) == []
    assert "No layout has been measured" in (study / "report.html").read_text()


def test_figures_are_in_the_page(tmp_path: Path) -> None:
    """The page's PNGs are the files, bit for bit, and the page needs nothing else."""
    write_scaling_report(write_study(tmp_path, *_sweep(), make_row(loss="lm")))
    page = (tmp_path / "report.html").read_text()
    inside = {base64.b64decode(data) for data in re.findall(r"base64,([\w+/=]+)", page)}
    assert inside == {f.read_bytes() for f in (tmp_path / "figures").iterdir()}
    assert not re.search(r'(?:src|href)="(?!data:)', page)


def test_traces_are_linked_from_where_the_page_is(tmp_path: Path) -> None:
    """Relative, quoted; only those that exist and lie in the study."""
    contents = [make_row(8, p, name=n, timeline=None) for p, n in ((2, "a & b"), (4, "../outside"), (1, "none"))]
    study = tmp_path / "study"
    for content in contents:
        write_study(study, content | {"name": "x"})
        (study / "rows" / "x.json").rename(study / "rows" / f"{content['pipeline']}.json")
        (study / "rows" / f"{content['pipeline']}.json").write_text(json.dumps(content))
    (study / "traces").mkdir()
    (study / "traces" / "a & b.json").write_text("{}")
    (study / "outside.json").write_text("{}")
    (tmp_path / "pages").mkdir()
    write_scaling_report(study, tmp_path / "pages" / "p.html")
    links = re.findall(r'href="(.*?)"', (tmp_path / "pages" / "p.html").read_text())
    assert links == ["../study/traces/a%20%26%20b.json"]


def test_rows_are_no_html_and_no_formula(tmp_path: Path) -> None:
    """Angle brackets, quotes, rich's markup and matplotlib's dollars come out as they went in."""
    evil = "<script>alert('1')</script> \"[/bold] $x^$ & \\"
    contents = [make_row(g, p, model=evil, gpu=evil, loss=evil, name=f"{evil}{g}") for g, p in ((8, 2), (16, 2))]
    contents += [make_row(8, 4), lost(make_row(64), "failed", evil)]
    study = tmp_path / "study"
    for i, content in enumerate(contents):
        content["environment"] = {evil: evil}
        write_study(study, content | {"name": f"row{i}"})
        (study / "rows" / f"row{i}.json").write_text(json.dumps(content))
    text = write_scaling_report(study)
    page = (study / "report.html").read_text()
    assert "<script" not in page
    assert evil in {cell for line in _cells(page) for cell in line}
    assert "[/bold]" in text


def test_broken_rows_are_warned_of(tmp_path: Path) -> None:
    """Half a file and a number that is none: named in terminal and page, and the report is made."""
    study = write_study(tmp_path, make_row(), make_row(8, 4, seconds=float("nan"), mfu="high"))
    (study / "rows" / "half.json").write_text("{")
    text = write_scaling_report(study)
    assert "warning: rows/half.json is skipped" in text
    assert "seconds is nan" in text
    assert "mfu is &#x27;high&#x27;" in (study / "report.html").read_text()


def test_ten_thousand_spans_take_seconds(tmp_path: Path) -> None:
    """Three such timelines; the page stays below 5 MB."""
    contents = [make_row(64, p, v, 160) for p, v in ((2, 2), (4, 4), (8, 4))]
    assert max(sum(map(len, c["timeline"]["stages"])) for c in contents) > 10_000
    study, start = write_study(tmp_path, *contents), time.process_time()
    write_scaling_report(study)
    assert time.process_time() - start < 60
    assert (study / "report.html").stat().st_size < 5e6


@pytest.mark.parametrize("place", ["nothing", "half", "out"])
def test_bad_input_is_the_users(tmp_path: Path, place: str, monkeypatch: Any, capsys: Any) -> None:
    """No directory, no whole row, nowhere to write: exit code 2 and one sentence."""
    arguments = [str(tmp_path / place)]
    if place == "half":
        (tmp_path / place / "rows").mkdir(parents=True)
        (tmp_path / place / "rows" / "x.json").write_text("{")
    if place == "out":
        write_study(tmp_path / place, make_row())
        arguments += ["--out", str(tmp_path / "no" / "page.html")]
    monkeypatch.setattr(sys, "argv", ["megatron-fipo", "scaling", "report", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
