"""A report of one run or several: a page that is complete in one file, and its figures as *.png beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from rich import box
from rich.table import Table

from megatron_fipo.config import Config
from megatron_fipo.health import Finding, Limits, findings
from megatron_fipo.printable import printable
from megatron_fipo.report.compare import Series, draw_together, make_series
from megatron_fipo.report.credit import write_credit_page
from megatron_fipo.report.figures import AIME_2024, SECTIONS
from megatron_fipo.report.history import Run, read_run
from megatron_fipo.report.panels import FigureSpec, Reference, draw
from megatron_fipo.report.parts import Html, document, figure, table, terminal_text
from megatron_fipo.report.scores import before_after, comparison
from megatron_fipo.whole_file import write_whole

_NAMED = 5  # runs that a finding names


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
    found = _found(series)
    write_whole(page, _page(series, figures, _link(credit, page), found))
    said = _terminal_tables(series)
    warned = [f"{where}: {finding.text}" for where, finding in found]
    pages = [f"token credit: {credit}"] if credit else []
    return printable("\n".join([*said, *warned, *pages, f"report: {page}"]))


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
        length = run.count("rollout.max_response_tokens") or Config().rollout.max_response_tokens
        buffer = run.count("reward.overlong_buffer_tokens") or 0
        found += [(run_name(run), finding) for finding in findings(run.trained, Limits(length, buffer))]
    return found


def _found(series: Sequence[Series]) -> list[tuple[str, Finding]]:
    """(runs and steps, finding): of one run every finding, of several the first of each rule, for all that it is in."""
    found = [pair for one in series for pair in _findings(one)]
    if _alone(series):
        return [(f"{name}, {_when(finding)}", finding) for name, finding in found]
    rules = dict.fromkeys(finding.rule for _, finding in found)
    together = [[pair for pair in found if pair[1].rule == rule] for rule in rules]
    return [(_where(pairs), pairs[0][1]) for pairs in together]


def _where(found: Sequence[tuple[str, Finding]]) -> str:
    """Runs and steps of a rule's findings, the first of which the text after it is about."""
    places = [f"{name}, {_when(finding)}" for name, finding in found]
    if len(places) == 1:
        return places[0]
    shown = places[:_NAMED] + ([f"{len(places) - _NAMED} more"] if len(places) > _NAMED else [])
    return f"{'; '.join(shown)}. Of the first"


def _when(finding: Finding) -> str:
    return f"steps {finding.first} to {finding.last}" if finding.last > finding.first else f"step {finding.first}"


def published(run: Run) -> tuple[Reference, ...]:
    """Published levels, of runs that are evaluated on AIME 2024."""
    return AIME_2024 if re.search(r"aime.?(20)?24", str(run.setting("data.validation") or ""), re.IGNORECASE) else ()


def progress(run: Run) -> str:
    """Steps and minutes; for a run without its summary, of how many."""
    steps = int(run.trained[-1]["step"])
    seconds = run.summary.get("wall_seconds", run.trained[-1].get("wall_seconds"))
    took = f" in {seconds / 60:.1f} minutes" if seconds is not None else ""
    total = run.count("trainer.max_steps")
    goal = f" of {total}, not finished" if not run.summary and total else ""
    return f"{steps} steps{goal}{took}"


def _terminal_tables(series: Sequence[Series]) -> list[str]:
    """Of one run its table and progress; of several a line a series."""
    alone = _alone(series)
    head, lines = before_after(alone) if alone else comparison(series)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for place, name in enumerate([run_name(alone), *head[1:]] if alone else head):
        shown.add_column(name, justify="right" if place else "left", overflow="fold")
    for line in lines:
        shown.add_row(*line)
    return [terminal_text(shown), *([progress(alone)] if alone else [])]


def _alone(series: Sequence[Series]) -> Run | None:
    """The run, where there is only one."""
    return series[0].runs[0] if len(series) == 1 and len(series[0].runs) == 1 else None


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


def _page(
    series: Sequence[Series], figures: Mapping[str, bytes], credit: str, found: Sequence[tuple[str, Finding]]
) -> str:
    runs = [run for one in series for run in one.runs]
    parts = [
        _summary(series),
        credit,
        _health(found, alone=len(runs) == 1),
        *(_section(name, specs, figures) for name, specs in SECTIONS.items()),
        _latest(runs),
        *(_configuration(run, len(runs) > 1) for run in runs),
    ]
    return document(" and ".join(_names(runs)) if len(runs) < 3 else f"{len(runs)} runs", "\n".join(parts))


_SMOOTHED_NOTE = "Long runs: the bold line is a running mean over about 1% of the steps, the pale one the values."


def _summary(series: Sequence[Series]) -> str:
    """Of one run its progress and table; of several a line a series, and each run's own to be unfolded."""
    alone = _alone(series)
    if alone:
        return f"<p>{escape(progress(alone))}. {_SMOOTHED_NOTE}</p>\n{_before_after(alone)}"
    spread = " Of repeats: the mean ± the sample standard deviation; figures show the mean, from the smallest to the "
    note = f"{spread}largest pale." if any(one.low is not None for one in series) else ""
    head, lines = comparison(series)
    named = [[Html(_swatch(one) + escape(name)), *cells] for one, (name, *cells) in zip(series, lines, strict=True)]
    each = [
        f"<section><h3>{_swatch(one)}{escape(run_name(run))}</h3><p>{escape(progress(run))}</p>{_before_after(run)}</section>"
        for one in series
        for run in one.runs
    ]
    return (
        f"<p>A colour is a run.{note}</p>\n{table(head, named)}\n"
        f"<details><summary>Before and after, run by run</summary><div class=grid>{''.join(each)}</div></details>"
    )


def _swatch(series: Series) -> str:
    return f'<span class=swatch style="background:{escape(series.color)}"></span>'


def _before_after(run: Run) -> str:
    head, lines = before_after(run)
    return table(head, lines)


def _health(found: Sequence[tuple[str, Finding]], alone: bool) -> str:
    if not found:
        return "<h2>Health</h2>\n<p>No rule found anything.</p>"
    items = "\n".join(
        f"<li><b>{escape(_when(finding).capitalize() if alone else where)}</b>: "
        f"{escape(finding.text)} <small>({escape(_SOURCES[finding.rule.source])})</small></li>"
        for where, finding in found
    )
    return f"<h2>Health</h2>\n<ul>\n{items}\n</ul>"


_SOURCES = {"paper": "from the paper", "code": "from the authors' code", "choice": "our rule"}


def _latest(runs: Sequence[Run]) -> str:
    """Every metric's latest value, as metrics.jsonl has it."""
    latest = [{name: value for row in run.trained for name, value in row.items()} for run in runs]
    names = sorted({name for values in latest for name in values})
    lines = [[n, *(repr(values[n]) if n in values else "-" for values in latest)] for n in names]
    shown = table(["", *map(run_name, runs)], lines)
    return f"<details><summary>Latest value of every metric</summary>{shown}</details>"


def _configuration(run: Run, several: bool) -> str:
    if not run.config:
        return ""
    title = f"Configuration of {escape(run_name(run))}" if several else "Configuration"
    return f"<details><summary>{title}</summary><pre>{escape(run.config)}</pre></details>\n"


def _section(title: str, specs: tuple[FigureSpec, ...], figures: Mapping[str, bytes]) -> str:
    drawn = [figure(spec.title, spec.caption, figures[spec.name]) for spec in specs if spec.name in figures]
    return f"<h2>{title}</h2>\n<div class=grid>\n" + "\n".join(drawn) + "\n</div>" if drawn else ""
