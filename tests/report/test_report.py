import base64
import io
import json
import re
from html import escape

import matplotlib
import numpy as np
import pytest
from PIL import Image

from megatron_fipo.config import Config, DataConfig, EvalConfig, ModelConfig, TrainerConfig, to_yaml
from megatron_fipo.report.figures import SECTIONS
from megatron_fipo.report.history import History, read_metrics, read_run
from megatron_fipo.report.page import write_report
from megatron_fipo.report.panels import draw, running_mean
from megatron_fipo.report.parts import Html, document, table

SPECS = {spec.name: spec for specs in SECTIONS.values() for spec in specs}
CONFIG = Config(
    model=ModelConfig(hf_path="<model>"),
    data=DataConfig(train="train.parquet"),
    trainer=TrainerConfig(max_steps=500),
    eval=EvalConfig(samples=8),
)


def metric_names():
    """Every metric that some figure shows."""
    panels = [panel for spec in SPECS.values() for panel in spec.panels]
    lines = [x for p in panels for x in (*getattr(p, "lines", ()), *getattr(p, "parts", ()), *getattr(p, "extra", ()))]
    bands = [band for p in panels for band in getattr(p, "bands", ())]
    names = {line.metric for line in lines} | {n for band in bands for n in (band.low, band.high)}
    names |= {name for p in panels for name in (getattr(p, "x", "time/step"), getattr(p, "y", "time/step"))}
    return sorted(names)


def rows_of(steps, without=()):
    """A run of `steps` steps with an evaluation every 5."""
    random = np.random.default_rng(0)
    names = [n for n in metric_names() if not n.startswith(("eval/", "time/eval", *without))]
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "wall_seconds": 6.0 * step, **dict(zip(names, random.random(len(names)), strict=True))}
        if step % 5 == 0:
            row |= {"eval/avg@k": 0.4, "eval/cons@k": 0.5, "eval/cons_answered@k": 0.625, "eval/pass@k": 0.75}
            row |= {"eval/answered": 0.9375, "eval/length": 300.0, "time/eval": 2.0}
        rows.append(row)
    return rows


def write_run(directory, rows, summary=None):
    directory.mkdir(exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "config.yaml").write_text(to_yaml(CONFIG))
    if summary is not None:
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def summary_of(before, after, length_before=100.0, length_after=300.0):
    return {
        "steps": 10,
        "wall_seconds": 90.0,
        "before": before,
        "after": after,
        "evaluation": {"before": {"length": length_before}, "after": {"length": length_after}},
    }


BEFORE = {"avg@k": 0.125, "cons@k": 0.25, "cons_answered@k": 0.375, "pass@k": 0.5}
AFTER = {"avg@k": 0.4, "cons@k": 0.5, "cons_answered@k": 0.625, "pass@k": 0.75}


def table_line(text, name):
    return next(line.split()[len(name.split()) :] for line in text.splitlines() if line.strip().startswith(name))


@pytest.mark.usefixtures("no_figures")
def test_table_of_a_finished_run(tmp_path):
    """The table holds the summary's scores and the first and last row's numbers, with their differences."""
    rows = rows_of(10)
    rows[0] |= {"generated/accuracy": 0.2, "batch/response_length/mean": 120.0, "batch/reward": -0.5}
    rows[-1] |= {"generated/accuracy": 0.7, "batch/response_length/mean": 420.0, "batch/reward": 0.25}
    text = write_report(write_run(tmp_path / "run", rows, summary_of(BEFORE, AFTER)))
    assert table_line(text, "avg@8") == ["0.125", "0.400", "+0.275"]
    assert table_line(text, "cons@8") == ["0.250", "0.500", "+0.250"]
    assert table_line(text, "pass@8") == ["0.500", "0.750", "+0.250"]
    assert table_line(text, "mean response length") == ["100", "300", "+200"]
    assert table_line(text, "cons_answered@8") == ["0.375", "0.625", "+0.250"]
    assert table_line(text, "responses with an answer") == ["-", "0.938", "-"]
    assert table_line(text, "training reward") == ["-0.500", "0.250", "+0.750"]
    assert table_line(text, "generated accuracy") == ["0.200", "0.700", "+0.500"]
    assert table_line(text, "training response length") == ["120", "420", "+300"]
    assert "10 steps in 1.5 minutes" in text
    assert text.splitlines()[-1] == f"report: {tmp_path / 'run' / 'report.html'}"


@pytest.mark.usefixtures("no_figures")
def test_live_run_has_no_summary(tmp_path):
    """Without summary.json, the latest evaluation is the after, the before unknown, the goal the config's."""
    text = write_report(write_run(tmp_path, rows_of(7)))
    assert table_line(text, "avg@8") == ["-", "0.400", "-"]
    assert "7 steps of 500, not finished in 0.7 minutes" in text


@pytest.mark.usefixtures("no_figures")
def test_run_without_validation(tmp_path):
    """A run that never evaluates has no scores in its table and no evaluation figure."""
    rows = [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in rows_of(4)]
    text = write_report(write_run(tmp_path, rows, summary_of(None, None) | {"evaluation": None}))
    assert "avg@" not in text
    assert table_line(text, "generated accuracy")[1] == f"{rows[-1]['generated/accuracy']:.3f}"
    assert not (tmp_path / "figures" / "evaluation.png").exists()


def test_repeated_evaluations_count_once(tmp_path):
    """Rows that repeat the latest evaluation lose it; the first row's goes to step 0."""
    rows = rows_of(12)
    latest = {f"eval/{k}": v for k, v in BEFORE.items()}
    for row in rows:
        measured = {k: v for k, v in row.items() if k.startswith("eval/")}
        latest = measured or latest
        row |= latest
    run = read_run(write_run(tmp_path, rows))
    assert [(e["step"], e["eval/avg@k"]) for e in run.evaluations] == [(0, 0.125), (5, 0.4), (10, 0.4)]


def test_evaluations_only_where_measured(tmp_path):
    """Rows that hold an evaluation only where there was one stay as they are, and the summary's before is step 0."""
    run = read_run(write_run(tmp_path, rows_of(12), summary_of(BEFORE, AFTER)))
    assert [(e["step"], e["eval/avg@k"]) for e in run.evaluations] == [(0, 0.125), (5, 0.4), (10, 0.4)]
    assert run.before["eval/length"] == 100.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("without", "gone"),
    [
        (("policy/influence_",), {"influence_weight", "influence_clip"}),  # DAPO / GRPO
        (("mismatch/", "policy/first_"), {"mismatch"}),
        (("sampling/", "advantage/"), {"sampling", "advantage"}),
    ],
)
def test_missing_metrics_leave_their_figures_out(tmp_path, without, gone):
    """A figure is drawn exactly if the run logged something it shows; one of an earlier report is removed."""
    write_report(write_run(tmp_path, rows_of(6)))
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == set(SPECS)
    write_report(write_run(tmp_path, rows_of(6, without)))
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == set(SPECS) - gone


def test_steps_alone_make_a_page(tmp_path):
    """A run that logged nothing a figure shows has a page without figures."""
    write_report(write_run(tmp_path, [{"step": 1}]))
    assert "<img" not in (tmp_path / "report.html").read_text()


def test_page_is_self_contained(tmp_path):
    """The page embeds every PNG byte for byte, fits small screens, and refers to nothing outside itself."""
    write_report(write_run(tmp_path, rows_of(20), summary_of(BEFORE, AFTER)))
    page = (tmp_path / "report.html").read_text()
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert embedded == [(tmp_path / "figures" / f"{name}.png").read_bytes() for name in SPECS]
    outside_data = re.sub(r'"data:[^"]+"', "", page)
    assert not re.search(r"https?:|//\w|<script|<link|@import|url\(", outside_data)
    assert 'name="viewport"' in page
    assert re.findall(r"<th scope=row>avg@8</th><td>(.*?)</td><td>(.*?)</td>", page) == [("0.125", "0.400")]


@pytest.mark.usefixtures("no_figures")
def test_page_holds_the_resolved_config(tmp_path):
    """The resolved configuration is in the page, its markup characters escaped."""
    write_report(write_run(tmp_path, rows_of(2)))
    page = (tmp_path / "report.html").read_text()
    assert "hf_path: &lt;model&gt;" in page
    assert "<model>" not in page


def test_nothing_unfinished_is_left(tmp_path):
    """A written file is complete under its final name; no temporary file remains."""
    write_report(write_run(tmp_path, rows_of(3)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "figures", "metrics.jsonl", "report.html"]
    assert not [p for p in (tmp_path / "figures").iterdir() if p.name.startswith(".")]


@pytest.mark.slow
def test_ten_thousand_steps(tmp_path):
    """A run of 10,000 steps gives every figure, and a page below 5 MB."""
    write_report(write_run(tmp_path, rows_of(10_000)))
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == set(SPECS)
    assert (tmp_path / "report.html").stat().st_size < 5e6


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("value", "steps", "left_out"),
    [
        (0.0, 1, {"ratios"}),  # a ratio of 0 says that there was no token
        (0.0, 400, {"ratios"}),
        (-1.0, 3, set()),
        (1e-300, 3, set()),
        (1e260, 400, set()),
        (np.nan, 3, set(SPECS)),
        (np.inf, 3, set(SPECS)),
    ],
)
def test_extreme_values_are_drawn(value, steps, left_out):
    """Zero, negative, tiny and huge metrics draw without a warning, on log scales too; non-finite ones are no data."""
    metrics = {name: abs(value) if name.startswith("time/") else value for name in metric_names()}
    history = History.from_rows([{"step": s, **metrics} for s in range(1, steps + 1)])
    assert {name for name, spec in SPECS.items() if draw(spec, history)} == set(SPECS) - left_out


def test_figures_have_one_size():
    """Every figure has the same size in pixels, so that they align side by side."""
    history = History.from_rows(rows_of(9))
    assert {Image.open(io.BytesIO(draw(spec, history))).size for spec in SPECS.values()} == {(960, 615)}


def test_caller_s_matplotlib_is_untouched(tmp_path):
    """Drawing changes no matplotlib default and opens no pyplot figure."""
    before = dict(matplotlib.rcParams)
    write_report(write_run(tmp_path, rows_of(3)))
    assert dict(matplotlib.rcParams) == before


@pytest.mark.usefixtures("no_figures")
def test_torn_last_line_is_tolerated(tmp_path):
    """A last line without newline that is cut short is left out: the run is writing it."""
    write_run(tmp_path, rows_of(3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "reward/mea')
    assert "3 steps" in write_report(tmp_path)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"step": 2, "reward/mea', "line 2: invalid JSON"),
        ("[1, 2]", "line 2: not a JSON object with a step"),
        ('{"batch/reward": 1.0}', "line 2: not a JSON object with a step"),
        ('{"step": 2, "batch/reward": "high"}', "line 2: batch/reward = high must be a number"),
        ('{"step": null}', "line 2: not a JSON object with a step"),
        ('{"step": 1e999}', "line 2: step = inf must be a non-negative integer"),
        ('{"step": 2.5}', "line 2: step = 2.5 must be a non-negative integer"),
        ('{"step": -1}', "line 2: step = -1 must be a non-negative integer"),
        ('{"step": 2, "x": ' + "9" * 4000 + "}", "line 2: x = 999"),
        ("[" * 99999, "line 2: not a row of metrics: nested too deeply"),
    ],
)
def test_broken_line_is_named(tmp_path, line, complaint):
    """A damaged line inside the file is an error that names its number."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=re.escape(complaint)):
        write_report(tmp_path)
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=re.escape(complaint)):
        read_metrics(path)


def test_not_a_run(tmp_path):
    """A directory without metrics, a missing one, and a run without a finished step are errors that say so."""
    with pytest.raises(ValueError, match=r"is not a run: it has no metrics\.jsonl"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="is not a run"):
        write_report(tmp_path / "absent")
    for content in ("", "\n", '{"st', '{"step": 0, "eval/avg@k": 0.1}\n'):
        (tmp_path / "metrics.jsonl").write_text(content)
        with pytest.raises(ValueError, match="contains no finished step yet"):
            write_report(tmp_path)


def test_damaged_summary(tmp_path):
    """A summary that is no JSON object is an error that names the file."""
    write_run(tmp_path, rows_of(2))
    for content in ("{", "[]"):
        (tmp_path / "summary.json").write_text(content)
        with pytest.raises(ValueError, match=r"summary\.json (is not valid JSON|must be a JSON object)"):
            write_report(tmp_path)


def test_steps_of_a_resumed_run(tmp_path):
    """For a step that a resumed run repeated, the last row counts, in the order of steps."""
    rows = [{"step": s, "generated/accuracy": a} for s, a in ((1, 0.1), (2, 0.2), (3, 0.3), (2, 0.25), (3, 0.35))]
    run = read_run(write_run(tmp_path, rows))
    assert [(r["step"], r["generated/accuracy"]) for r in run.rows] == [(1, 0.1), (2, 0.25), (3, 0.35)]


def test_running_mean():
    """Centred, over fewer values at the ends, and exact on a line away from them."""
    np.testing.assert_allclose(running_mean(np.arange(6.0), 3), [0.5, 1, 2, 3, 4, 4.5])
    np.testing.assert_array_equal(running_mean(np.array([3.0, 1.0]), 1), [3, 1])


PAYLOAD = "<img src=x onerror=alert(1)>"


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("section", "key"),
    [("trainer", "max_steps"), ("eval", "samples"), ("run", "name"), ("rollout", "max_response_tokens")],
)
def test_edited_config_stays_text(tmp_path, section, key):
    """Whatever is in config.yaml, no markup of it comes to the page, alone or beside another run."""
    config = f"{section}:\n  {key}: '{PAYLOAD}'\n"
    runs = [write_run(tmp_path / name, rows_of(2)) for name in ("a", "b")]
    (runs[0] / "config.yaml").write_text(config)
    write_report(runs[0])
    write_report(runs, tmp_path / "both.html")
    for page in (runs[0] / "report.html", tmp_path / "both.html"):
        text = page.read_text()
        assert "<img src=x" not in text
        assert escape(PAYLOAD) in text


@pytest.mark.usefixtures("no_figures")
def test_secret_of_an_edited_config_is_not_resolved(tmp_path, monkeypatch):
    """A report shows what config.yaml says, and reads no environment variable for it."""
    monkeypatch.setenv("SECRET", "hf_0123456789")
    write_run(tmp_path, rows_of(2))
    (tmp_path / "config.yaml").write_text("run: {name: '${oc.env:SECRET}'}\n")
    said = write_report(tmp_path)
    assert "hf_0123456789" not in said + (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("text", ["- a\n- b\n", "3", "a: [", "\x00", "a: ${b\n"])
def test_broken_config_is_named(tmp_path, text):
    """A config.yaml that is none is told by its name."""
    write_run(tmp_path, rows_of(2))
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"cannot read .*config\.yaml"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "summary",
    ['{"before": [1]}', '{"after": {"avg@k": "x"}}', '{"wall_seconds": "x"}', '{"evaluation": 3}', "[" * 99999],
)
def test_summary_of_another_kind(tmp_path, summary):
    """A summary.json of other types is told by its name."""
    write_run(tmp_path, rows_of(2))
    (tmp_path / "summary.json").write_text(summary)
    with pytest.raises(ValueError, match=r"summary\.json (is not|must be)"):
        write_report(tmp_path)


def test_pages_load_and_run_nothing():
    """Any text of a table is escaped unless it is marked as HTML; the page's policy forbids all but its own style."""
    assert PAYLOAD not in table([PAYLOAD], [[PAYLOAD, PAYLOAD]])
    assert table(["x"], [[Html("<b>x</b>")]]).count("<b>x</b>") == 1
    page = document(PAYLOAD, "")
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]+)">', page)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == "'none'"
    assert rules == {"img-src": "data:", "style-src": "'unsafe-inline'", "base-uri": "'none'", "form-action": "'none'"}
    assert PAYLOAD not in page
