"""A run's report: <run>/report.html, complete in one file, and <run>/figures/*.png."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_fipo.report.figures import SECTIONS
from megatron_fipo.report.history import History, Run, read_run
from megatron_fipo.report.panels import FigureSpec, draw
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


def write_report(run: Path) -> str:
    """Draw a run's figures and page, of a finished or a live run; returns what to print.

    Raises:
        ValueError: `run` is no run, has no finished step, or a file in it is damaged.
    """
    read = read_run(run)
    figures = _write_figures(read)
    page = run / "report.html"
    write_whole(page, _page(read, figures))
    return f"{_terminal_table(read)}\n{progress(read)}\nreport: {page}"


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


def _write_figures(run: Run) -> dict[str, bytes]:
    """PNGs by name, written to <run>/figures; one that an earlier report drew and this run has no data for goes."""
    history = History.from_rows(run.rows)
    folder = run.directory / "figures"
    folder.mkdir(exist_ok=True)
    figures = {}
    for spec in (spec for specs in SECTIONS.values() for spec in specs):
        png = draw(spec, history)
        if png is None:
            (folder / f"{spec.name}.png").unlink(missing_ok=True)
        else:
            write_whole(folder / f"{spec.name}.png", png)
            figures[spec.name] = png
    return figures


def _page(run: Run, figures: Mapping[str, bytes]) -> str:
    name = escape(run_name(run))
    sections = "\n".join(_section(title, specs, figures) for title, specs in SECTIONS.items())
    config = f"<details><summary>Configuration</summary><pre>{escape(run.config)}</pre></details>" if run.config else ""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>{STYLE}</style>
<h1>{name}</h1>
<p>{progress(run)}. Long runs: the bold line is a running mean over about 1% of the steps, the pale one the values.</p>
{_html_table(run)}
{sections}
{config}
</html>
"""


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
