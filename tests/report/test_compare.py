"""Several runs on one page: their numbers, their names, repeats as a mean with its spread, published levels."""

from __future__ import annotations

import io
import json
import re
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from megatron_fipo.config import to_yaml
from megatron_fipo.report.compare import _draw_panel, draw_together, make_series
from megatron_fipo.report.figures import AIME_2024
from megatron_fipo.report.history import History, read_run
from megatron_fipo.report.page import published, write_report
from megatron_fipo.report.panels import draw, fitted_line
from megatron_fipo.report.reflection import rate, reflection_rates
from megatron_fipo.report.scores import comparison
from tests.report.test_report import AFTER, BEFORE, CONFIG, SPECS, rows_of, summary_of, write_run


def named_run(directory, rows, **sections):
    """A run whose name is the directory's."""
    write_run(directory, rows, summary_of(BEFORE, AFTER))
    config = replace(CONFIG, run=replace(CONFIG.run, name=directory.name), **sections)
    (directory / "config.yaml").write_text(to_yaml(config))
    return directory


def series_of(paths, groups=()):
    runs = [read_run(path) for path in paths]
    return make_series(runs, [path.name for path in paths], groups)


def test_page_of_several_runs(tmp_path):
    """The page stands at --out, its figures beside it, every run has its table, and the runs' own pages stay away."""
    runs = [named_run(tmp_path / name, rows_of(8)) for name in ("fipo", "dapo", "a<b>")]
    text = write_report(runs, tmp_path / "all.html")
    page = (tmp_path / "all.html").read_text()
    assert re.findall(r"</span>(.*?)</h3>", page) == ["fipo", "dapo", "a&lt;b&gt;"]
    assert page.count("<th scope=row>avg@8</th><td>0.125</td><td>0.400</td>") == 3
    assert text.endswith(f"report: {tmp_path / 'all.html'}")
    assert {p.stem for p in (tmp_path / "all_figures").iterdir()} == set(SPECS)
    assert not any((run / "report.html").exists() for run in runs)
    assert not re.search(r"https?:|<script|<link|@import|url\(", re.sub(r'"data:[^"]+"', "", page))


@pytest.mark.usefixtures("no_figures")
def test_default_place_of_several_runs(tmp_path, monkeypatch):
    """Without --out it is report.html in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_report([named_run(tmp_path / name, rows_of(2)) for name in ("x", "y")])
    assert (tmp_path / "report.html").is_file()


@pytest.mark.usefixtures("no_figures")
def test_page_s_numbers_are_the_metrics_file_s(tmp_path):
    """The latest value of every metric reads on the page exactly as the file has it."""
    runs = [named_run(tmp_path / name, rows_of(n)) for name, n in (("x", 7), ("y", 12))]
    write_report(runs, tmp_path / "all.html")
    table = (tmp_path / "all.html").read_text().partition("Latest value of every metric")[2]
    shown = {name: cells for name, *cells in re.findall(r"scope=row>(.*?)</th><td>(.*?)</td><td>(.*?)</td>", table)}
    for place, run in enumerate(runs):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        latest = {name: value for line in lines for name, value in line.items()}
        assert {name: float(shown[name][place]) for name in latest} == latest
        assert len(latest) > 50


def test_lines_are_the_metrics_file_s(tmp_path):
    """A panel shows that column of each run, in that run's colour."""
    runs = [named_run(tmp_path / name, rows_of(n)) for name, n in (("x", 7), ("y", 12))]
    series = series_of(runs)
    axes = Figure().subplots()
    _draw_panel(SPECS["approx_kl"].panels[0], axes, series)
    assert len({one.color for one in series}) == 2
    for line, one, run in zip(axes.get_lines(), series, runs, strict=True):
        rows = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
        np.testing.assert_array_equal(line.get_ydata(), [row["policy/approx_kl"] for row in rows])
        assert line.get_color() == one.color


def test_repeats_are_a_mean_with_its_spread(tmp_path):
    """Runs called NAME-seedN are one series: mean and t interval, at the steps that all of them have."""
    values = {"x-seed1": [1.0, 2.0, 6.0], "x-seed2": [3.0, 4.0], "y-seed1": [5.0]}
    paths = [
        named_run(tmp_path / name, [{"step": s, "policy/entropy": v} for s, v in enumerate(column, start=1)])
        for name, column in values.items()
    ]
    x, y = series_of(paths)
    assert (x.label, y.label, y.low) == ("x (n = 2 to step 2)", "y-seed1", None)
    entropy = [h["policy/entropy"][h.steps > 0] for h in (x.history, x.low, x.high)]
    np.testing.assert_array_equal(entropy[0], [2.0, 3.0])
    for step, pair in enumerate(([1.0, 3.0], [2.0, 4.0])):
        low, high = stats.t.interval(0.95, 1, np.mean(pair), stats.sem(pair))
        assert (entropy[1][step], entropy[2][step]) == pytest.approx((low, high), rel=1e-9)


def test_a_crashed_seed_does_not_lift_the_mean(tmp_path):
    """Where a run with a low score ends, figures and table end for all repeats, not only for that run."""
    scores = {"x-seed1": [0.1, 0.2], "x-seed2": [0.5, 0.6, 0.7, 0.8], "x-seed3": [0.5, 0.6, 0.7, 0.8]}
    paths = []
    for name, column in scores.items():
        rows = [
            {"step": s, "generated/accuracy": v, "eval/avg@k": v, "time/eval": 1.0} for s, v in enumerate(column, 1)
        ]
        paths.append(named_run(tmp_path / name, rows))
        (paths[-1] / "summary.json").unlink()
    (series,) = series_of(paths)
    trained = series.history.steps > 0
    np.testing.assert_array_equal(series.history.steps[trained], [1.0, 2.0])
    np.testing.assert_allclose(series.history["generated/accuracy"][trained], [1.1 / 3, 1.4 / 3])
    head, (line,) = comparison([series])
    cells = dict(zip(head, line, strict=True))
    assert (cells["runs"], cells["steps"], cells["avg@8"]) == ("3", "2 of 500", "0.467 ±0.231")


def test_a_step_without_a_value_of_every_run_has_no_mean(tmp_path):
    """Where one run's metric was not finite, the mean of the others is not drawn in its place."""
    paths = []
    for name, column in {"x-seed1": [1.0, None, 3.0], "x-seed2": [3.0, 4.0, 5.0]}.items():
        rows = [{"step": s, "policy/entropy": v} for s, v in enumerate(column, 1)]
        paths.append(named_run(tmp_path / name, rows))
    (series,) = series_of(paths)
    np.testing.assert_array_equal(series.history["policy/entropy"][-3:], [2.0, np.nan, 4.0])


def test_the_axis_is_of_the_means(tmp_path):
    """The interval of two runs, 13 times as wide as their distance, does not flatten the curves."""
    paths = [
        named_run(tmp_path / name, [{"step": s, "policy/entropy": v + s} for s in range(1, 9)])
        for name, v in (("x-seed1", 1.0), ("x-seed2", 2.0))
    ]
    axes = Figure().subplots()
    _draw_panel(SPECS["entropy"].panels[0], axes, series_of(paths))
    low, high = axes.get_ylim()
    assert 2.0 < low < 2.5
    assert 9.5 < high < 10.0


@pytest.mark.usefixtures("no_figures")
def test_comparison_of_repeats(tmp_path):
    """Terminal and page have a line a series: mean and sample standard deviation of what the repeats came to."""
    scores = {"fipo-seed1": 0.50, "fipo-seed2": 0.56, "fipo-seed3": 0.62, "dapo-seed1": 0.40}
    runs = [named_run(tmp_path / name, rows_of(4)) for name in scores]
    for run, score in zip(runs, scores.values(), strict=True):
        summary = summary_of(BEFORE, {**AFTER, "avg@k": score})
        (run / "summary.json").write_text(json.dumps(summary))
    text = write_report(runs, tmp_path / "all.html").splitlines()
    page = re.sub(r"<span[^>]*></span>", "", (tmp_path / "all.html").read_text())
    wanted = {
        "fipo": ["3", "4", "0.125 ±0.000", "0.560 ±0.060", "0.500 ±0.000", "0.750 ±0.000", "300 ±0"],
        "dapo-seed1": ["1", "4", "0.125", "0.400", "0.500", "0.750", "300"],
    }
    for name, cells in wanted.items():
        (line,) = [line for line in text if line.strip().startswith(f"{name} ")]
        assert line.split()[1:] == " ".join(cells).split()
        (row,) = re.findall(f"<th scope=row>{name}</th>(.*)</tr>", page)
        assert re.findall("<td>(.*?)</td>", row) == cells


def test_groups_by_the_beginning_of_the_name(tmp_path):
    """--group takes runs together whose names begin so."""
    paths = [named_run(tmp_path / name, rows_of(2)) for name in ("fipo-a", "fipo-b", "dapo")]
    assert [one.label for one in series_of(paths, ["fipo"])] == ["fipo (n = 2)", "dapo"]


def test_a_run_named_twice(tmp_path):
    """The same directory twice is an error."""
    run = named_run(tmp_path / "x", rows_of(2))
    with pytest.raises(ValueError, match="given twice"):
        write_report([run, tmp_path / "y" / ".." / "x"], tmp_path / "all.html")


@pytest.mark.parametrize(
    ("path", "levels"),
    [("data/aime-2024.parquet", 4), ("AIME24.parquet", 4), ("aime-2025.parquet", 0), ("validation.parquet", 0)],
)
def test_published_levels_on_aime_2024_only(tmp_path, path, levels):
    """They are drawn where the validation set is the one that they were measured on."""
    run = read_run(named_run(tmp_path / "x", rows_of(5), data=replace(CONFIG.data, validation=path)))
    assert len(published(run)) == levels
    plain = draw(SPECS["evaluation"], History.from_rows(run.rows))
    assert (draw(SPECS["evaluation"], History.from_rows(run.rows), published(run)) != plain) == bool(levels)
    assert {r.label: r.level for r in AIME_2024} == {
        "DAPO-32B": 0.5,
        "FIPO-32B": 0.56,
        "R1-Zero-32B": 0.47,
        "o1-mini": 0.56,
    }


def test_fitted_line():
    """Least squares on a line gives it back with r = 1; one x, two points or NaNs give none."""
    line = fitted_line(np.array([1.0, 2.0, np.nan, 4.0]), np.array([3.0, 5.0, 0.0, 9.0]))
    assert (line.x, line.y) == ((1.0, 4.0), (3.0, 9.0))
    assert line.r == pytest.approx(1.0)
    assert fitted_line(np.ones(5), np.arange(5.0)) is None
    assert fitted_line(np.arange(2.0), np.arange(2.0)) is None


def test_reflection_rates(tmp_path):
    """Marker words count as whole words in any case; steps are those of the files, parts of a step go together."""
    folder = tmp_path / "rollouts"
    (folder / "step_3.parquet").mkdir(parents=True)
    pq.write_table(pa.table({"response": ["Wait, wait! However.", "so 4"]}), folder / "step_1.parquet")
    pq.write_table(pa.table({"response": ["await howevers"]}), folder / "step_3.parquet" / "part-0.parquet")
    pq.write_table(pa.table({"response": ["Let me check."]}), folder / "step_3.parquet" / "part-1.parquet")
    assert reflection_rates(folder) == {
        1: {"reflection/share": 0.5, "reflection/markers": 1.5},
        3: {"reflection/share": 0.5, "reflection/markers": 0.5},
    }
    assert rate([]) == {"reflection/share": 0.0, "reflection/markers": 0.0}


@pytest.mark.usefixtures("no_figures")
def test_a_rule_is_explained_once_for_all_runs(tmp_path):
    """Runs in which a rule found something are named together."""
    rows = rows_of(8)
    for row in rows:
        row |= {"policy/influence_weight_min": 1.0, "policy/influence_weight_max": 1.0, "policy/updates": 1.0}
    runs = [named_run(tmp_path / f"run{n}", rows) for n in range(7)]
    text = write_report(runs, tmp_path / "all.html")
    places = "; ".join(f"run{n}, steps 5 to 8" for n in range(5))
    assert f"{places}; 2 more. Of the first: FIPO does nothing" in text
    assert (tmp_path / "all.html").read_text().count("FIPO does nothing") == 1


def test_a_long_legend_has_its_own_room(tmp_path):
    """A figure of many runs is taller by the rows of its legend, so that none lies on a panel."""
    series = series_of([named_run(tmp_path / f"run{n}", rows_of(3)) for n in range(12)])
    pngs = [draw_together(SPECS["entropy"], some, ()) for some in (series[:6], series)]
    few, many = (Image.open(io.BytesIO(png)).size for png in pngs if png is not None)
    assert many[0] == few[0]
    assert many[1] - few[1] == round(2 * 0.17 * 150)


@pytest.mark.usefixtures("no_figures")
def test_findings_are_on_the_page(tmp_path):
    """A rule that holds is listed with its steps, its reason and where it comes from; else the page says none does."""
    rows = rows_of(8)
    for row in rows:
        row |= {"policy/influence_weight_min": 1.0, "policy/influence_weight_max": 1.0, "policy/updates": 1.0}
    text = write_report(named_run(tmp_path / "x", rows))
    page = (tmp_path / "x" / "report.html").read_text()
    assert "<li><b>Steps 5 to 8</b>: FIPO does nothing: every influence weight" in page
    assert "(from the authors&#x27; code)" in page or "(from the authors' code)" in page
    assert "x, steps 5 to 8: FIPO does nothing" in text
    write_report(named_run(tmp_path / "y", [{"step": 1}]))
    assert "No findings." in (tmp_path / "y" / "report.html").read_text()


def test_figures_of_several_runs_have_the_usual_size(tmp_path):
    """Figures are like those of one run: 960 x 615 pixels, for every figure that has data."""
    series = series_of([named_run(tmp_path / name, rows_of(9)) for name in ("x", "y")])
    drawn = {name: draw_together(spec, series) for name, spec in SPECS.items()}
    assert {Image.open(io.BytesIO(png)).size for png in drawn.values()} == {(960, 615)}


@pytest.mark.slow
def test_three_long_runs(tmp_path):
    """Three runs of 10,000 steps: a page below 5 MB, within two minutes of CPU time."""
    runs = [named_run(tmp_path / name, rows_of(10_000)) for name in ("x", "y", "z")]
    started = time.process_time()
    write_report(runs, tmp_path / "all.html")
    seconds = time.process_time() - started
    print(f"3 x 10,000 steps: {seconds:.1f} s of CPU time, {(tmp_path / 'all.html').stat().st_size / 1e6:.1f} MB")
    assert (tmp_path / "all.html").stat().st_size < 5e6
    assert seconds < 120
