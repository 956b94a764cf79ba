"""A report of one run or several: a page that is complete in one file, and its figures as *.png beside it."""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_fipo.config import Config
from megatron_fipo.health import Finding, Limits, findings
from megatron_fipo.report.compare import Series, draw_together, make_series
from megatron_fipo.report.credit import write_credit_page
from megatron_fipo.report.figures import AIME_2024, SECTIONS
from megatron_fipo.report.history import Run, read_run
from megatron_fipo.report.panels import FigureSpec, Reference, draw
from megatron_fipo.run_log import write_whole

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --page: #f4f5f6; --ink: #22272b; --soft: #636b72; --line: #dde1e4 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #1f1f1f; --page: #141414; --ink: #e4e6e8; --soft: #a0a7ad; --line: #383c40 }
  img { filter: invert(.88) hue-rotate(180deg) }
}
body { margin: 0 auto; padding: 1rem; max-width: 84rem; background: var(--page); color: var(--ink);
       font: 16px/1.5 system-ui, sans-serif }
h1 { margin: .5rem 0; font-size: 1.5rem; overflow-wrap: anywhere } h2 { margin: 2rem 0 .7rem; font-size: 1.1rem }
p, figcaption { color: var(--soft) }
table { border-collapse: collapse; background: var(--paper); font-variant-numeric: tabular-nums }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right }
th:first-child { text-align: left; font-weight: 500 }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)) }
figure { margin: 0; padding: .6rem; background: var(--paper); border: 1px solid var(--line); border-radius: .4rem;
         max-width: 48rem }
img { display: block; width: 100%; height: auto } figcaption { margin: .3rem .4rem .2rem; font-size: .875rem }
details { margin: 2rem 0 } summary { cursor: pointer } pre { overflow-x: auto; font-size: .8rem }
.wide { overflow-x: auto } .swatch { display: inline-block; width: .8em; height: .8em; margin-right: .4em }
h3 { margin: .5rem 0 0; font-size: 1rem; overflow-wrap: anywhere } section > p { margin: 0 0 .4rem }
@media (max-width: 30rem) { body { padding: .6rem } th, td { padding: .3rem .4rem; font-size: .875rem } }
"""


class Result(NamedTuple):
    """A line of the before/after table; None: not known (yet)."""

    name: str
    before: float | None
    after: float | None
    format: str

    def cells(self) -> tuple[str, str, str, str]:
        change = None if self.before is None or self.after is None else self.after - self.before
        signed = "-" if change is None else f"{change:+{self.format}}"
        return self.name, self._cell(self.before), self._cell(self.after), signed

    def _cell(self, value: float | None) -> str:
        return "-" if value is None else f"{value:{self.format}}"


def write_report(runs: Path | Sequence[Path], out: Path | None = None, groups: Sequence[str] = ()) -> str:
    """Draw the figures and the page of finished or live runs; returns what to print.

    Args:
        out: the page. None: <run>/report.html of one run, ./report.html of several.
        groups: runs whose names begin with one of these are repeats of one run, as those called NAME-seedN are.

    Raises:
        ValueError: a directory is no run, has no finished step, or a file in it is damaged.
    """
    directories = [runs] if isinstance(runs, Path) else list(runs)
    if len({directory.resolve() for directory in directories}) < len(directories):
        raise ValueError("a run is named twice; name each once")
    read = [read_run(directory) for directory in directories]
    page = out or (directories[0] / "report.html" if len(read) == 1 else Path("report.html"))
    series = make_series(read, _names(read), groups)
    credit = write_credit_page(read[0], run_name(read[0])) if len(read) == 1 else None
    figures = _write_figures(series, _figure_folder(page, directories))
    write_whole(page, _page(series, figures, _link(credit, page)))
    said = [f"{_terminal_table(run)}\n{progress(run)}" for run in read]
    warned = [f"{name}: {_when(f)}: {f.text}" for one in series for name, f in _findings(one)]
    pages = [f"token credit: {credit}"] if credit else []
    return "\n".join([*said, *warned, *pages, f"report: {page}"])


def _link(credit: Path | None, page: Path) -> str:
    if credit is None:
        return ""
    target = quote(os.path.relpath(credit, page.parent))
    return f'<p><a href="{target}">Responses with the credit of each token</a></p>'


def _figure_folder(page: Path, directories: Sequence[Path]) -> Path:
    own = directories[0] / "report.html"
    return own.with_name("figures") if page == own else page.with_name(f"{page.stem}_figures")


def _names(runs: Sequence[Run]) -> list[str]:
    """Of runs that have the same name, the path instead."""
    names = [run_name(run) for run in runs]
    return [name if names.count(name) == 1 else str(r.directory) for name, r in zip(names, runs, strict=True)]


def _findings(series: Series) -> list[tuple[str, Finding]]:
    """(run, what a health rule says about it)."""
    found = []
    for run in series.runs:
        length = run.setting("rollout.max_response_tokens") or Config().rollout.max_response_tokens
        buffer = run.setting("reward.overlong_buffer_tokens") or 0
        found += [(run_name(run), finding) for finding in findings(run.trained, Limits(length, buffer))]
    return found


def _when(finding: Finding) -> str:
    return f"steps {finding.first} to {finding.last}" if finding.last > finding.first else f"step {finding.first}"


def published(run: Run) -> tuple[Reference, ...]:
    """Published levels, of runs that are evaluated on AIME 2024."""
    return AIME_2024 if re.search(r"aime.?(20)?24", str(run.setting("data.validation") or ""), re.IGNORECASE) else ()


def results(run: Run) -> list[Result]:
    """Before and after: the evaluation, and what training itself saw in its first and last step."""
    k = run.setting("eval.samples") or "k"
    evaluation = [(f"eval/{name}@k", f"{name}@{k}", ".3f") for name in ("avg", "cons", "pass")]
    evaluation.append(("eval/length", "mean response length", ".0f"))
    training = [
        ("reward/accuracy", "training accuracy", ".3f"),
        ("response_length/mean", "training response length", ".0f"),
    ]
    first, last = run.trained[0], run.trained[-1]
    lines = [Result(label, run.before.get(m), run.after.get(m), form) for m, label, form in evaluation]
    lines += [Result(label, first.get(m), last.get(m), form) for m, label, form in training]
    return [line for line in lines if line.before is not None or line.after is not None]


def progress(run: Run) -> str:
    """Steps and minutes; for a run without its summary, of how many."""
    steps = int(run.trained[-1]["step"])
    seconds = run.summary.get("wall_seconds", run.trained[-1].get("wall_seconds"))
    took = f" in {seconds / 60:.1f} minutes" if seconds is not None else ""
    total = run.setting("trainer.max_steps")
    goal = f" of {total}, not finished" if not run.summary and total else ""
    return f"{steps} steps{goal}{took}"


def _terminal_table(run: Run) -> str:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(run_name(run))
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    for line in results(run):
        table.add_row(*line.cells())
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    return "\n".join(row.rstrip() for row in text.getvalue().strip("\n").splitlines())


def run_name(run: Run) -> str:
    return str(run.setting("run.name") or run.directory.resolve().name)


def _write_figures(series: Sequence[Series], folder: Path) -> dict[str, bytes]:
    """PNGs by name, written to `folder`; one that an earlier report drew and there is no data for goes."""
    references = tuple(dict.fromkeys(r for one in series for run in one.runs for r in published(run)))
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    for spec in (spec for specs in SECTIONS.values() for spec in specs):
        png = _draw(spec, series, references)
        if png is None:
            (folder / f"{spec.name}.png").unlink(missing_ok=True)
        else:
            write_whole(folder / f"{spec.name}.png", png)
            figures[spec.name] = png
    return figures


def _draw(spec: FigureSpec, series: Sequence[Series], references: Sequence[Reference]) -> bytes | None:
    if len(series) == 1 and series[0].low is None:
        return draw(spec, series[0].history, references)
    return draw_together(spec, series, references)


def _page(series: Sequence[Series], figures: Mapping[str, bytes], credit: str) -> str:
    runs = [run for one in series for run in one.runs]
    title = escape(" and ".join(_names(runs)) if len(runs) < 3 else f"{len(runs)} runs")
    sections = "\n".join(_section(name, specs, figures) for name, specs in SECTIONS.items())
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
<h1>{title}</h1>
{_summary(series)}
{credit}
{_health(series)}
{sections}
{_latest(series)}
{"".join(_configuration(run, len(runs) > 1) for run in runs)}
</html>
"""


_SMOOTHED_NOTE = "Long runs: the bold line is a running mean over about 1% of the steps, the pale one the values."


def _summary(series: Sequence[Series]) -> str:
    """Of one run its progress and table; of several the same each, under the run's name in its colour."""
    if len(series) == 1 and len(series[0].runs) == 1:
        return f"<p>{progress(series[0].runs[0])}. {_SMOOTHED_NOTE}</p>\n{_html_table(series[0].runs[0])}"
    tables = [
        f'<section><h3><span class=swatch style="background:{one.color}"></span>{escape(run_name(run))}</h3>'
        f"<p>{progress(run)}</p><div class=wide>{_html_table(run)}</div></section>"
        for one in series
        for run in one.runs
    ]
    spread = " Repeats of a run are drawn as their mean, from the smallest to the largest pale."
    note = spread if any(one.low is not None for one in series) else ""
    return f"<p>A colour is a run.{note}</p>\n<div class=grid>{''.join(tables)}</div>"


def _health(series: Sequence[Series]) -> str:
    found = [(name, finding) for one in series for name, finding in _findings(one)]
    if not found:
        return "<h2>Health</h2>\n<p>No rule found anything.</p>"
    several = sum(len(one.runs) for one in series) > 1
    items = "\n".join(
        f"<li><b>{escape(f'{name}, {_when(f)}' if several else _when(f).capitalize())}</b>: {escape(f.text)} "
        f"<small>({_SOURCES[f.rule.source]})</small></li>"
        for name, f in found
    )
    return f"<h2>Health</h2>\n<ul>\n{items}\n</ul>"


_SOURCES = {"paper": "from the paper", "code": "from the authors' code", "choice": "our rule"}


def _latest(series: Sequence[Series]) -> str:
    """Every metric's latest value, as metrics.jsonl has it."""
    runs = [run for one in series for run in one.runs]
    latest = [{name: value for row in run.trained for name, value in row.items()} for run in runs]
    names = sorted({name for values in latest for name in values})
    head = "".join(f"<th>{escape(run_name(run))}</th>" for run in runs)
    rows = "\n".join(
        f"<tr><th scope=row>{escape(name)}</th>"
        + "".join(f"<td>{values[name]!r}</td>" if name in values else "<td>-</td>" for values in latest)
        + "</tr>"
        for name in names
    )
    return (
        "<details><summary>Latest value of every metric</summary><div class=wide><table>\n"
        f"<tr><th></th>{head}</tr>\n{rows}\n</table></div></details>"
    )


def _configuration(run: Run, several: bool) -> str:
    if not run.config:
        return ""
    title = f"Configuration of {escape(run_name(run))}" if several else "Configuration"
    return f"<details><summary>{title}</summary><pre>{escape(run.config)}</pre></details>\n"


def _html_table(run: Run) -> str:
    rows = "\n".join(
        f"<tr><th scope=row>{escape(name)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        for name, *cells in (line.cells() for line in results(run))
    )
    return f"<table>\n<tr><th></th><th>before</th><th>after</th><th>change</th></tr>\n{rows}\n</table>"


def _section(title: str, specs: tuple[FigureSpec, ...], figures: Mapping[str, bytes]) -> str:
    drawn = [_figure(spec, figures[spec.name]) for spec in specs if spec.name in figures]
    return f"<h2>{title}</h2>\n<div class=grid>\n" + "\n".join(drawn) + "\n</div>" if drawn else ""


def _figure(spec: FigureSpec, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{escape(spec.title)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(spec.caption)}</figcaption></figure>"
    )
