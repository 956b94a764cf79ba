"""Report of one or more runs: a self-contained page, and its figures as *.png beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from rich import box
from rich.table import Table

from megatron_fipo import former_names
from megatron_fipo.atomic_file import write_atomically
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

_NAMED = 5  # maximum number of runs that a finding lists


def write_report(runs: Path | Sequence[Path], out: Path | None = None, groups: Sequence[str] = ()) -> str:
    """Write the figures and the page of finished or live runs; return the text to print.

    Args:
        out: path of the page. None: <run>/report.html for one run, ./report.html for several.
        groups: runs whose names begin with one of these are repeats of one run, like those named NAME-seedN.

    Raises:
        ValueError: a directory is not a run, has no finished step, or a file in it is damaged.
    """
    directories = [runs] if isinstance(runs, Path) else list(runs)
    if len({directory.resolve() for directory in directories}) < len(directories):
        raise ValueError("a run is given twice: give each run once")
    read = [read_run(directory) for directory in directories]
    page = out or (directories[0] / "report.html" if len(read) == 1 else Path("report.html"))
    series = make_series(read, _names(read), groups)
    credit = write_credit_page(read[0], run_name(read[0])) if len(read) == 1 else None
    figures = _write_figures(series, _figure_folder(page, directories))
    found = _grouped_findings(series)
    write_atomically(page, _page(series, figures, _link(credit, page), found))
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
    """Return the runs' names; for duplicates, the path instead."""
    names = [run_name(run) for run in runs]
    return [name if names.count(name) == 1 else str(r.directory) for name, r in zip(names, runs, strict=True)]


def _findings(series: Series) -> list[tuple[str, Finding]]:
    """Return (run, finding of a health rule) pairs."""
    found = []
    for run in series.runs:
        length = run.count("rollout.max_response_tokens") or Config().rollout.max_response_tokens
        buffer = run.count("reward.overlong_buffer_tokens") or 0
        found += [(run_name(run), finding) for finding in findings(run.trained, Limits(length, buffer))]
    return found


def _grouped_findings(series: Sequence[Series]) -> list[tuple[str, Finding]]:
    """Return (runs and steps, finding): for one run every finding, for several the first of each rule."""
    found = [pair for one in series for pair in _findings(one)]
    if _alone(series):
        return [(f"{name}, {_when(finding)}", finding) for name, finding in found]
    rules = dict.fromkeys(finding.rule for _, finding in found)
    together = [[pair for pair in found if pair[1].rule == rule] for rule in rules]
    return [(_where(pairs), pairs[0][1]) for pairs in together]


def _where(found: Sequence[tuple[str, Finding]]) -> str:
    """Return the runs and steps of a rule's findings; the text describes the first."""
    locations = [f"{name}, {_when(finding)}" for name, finding in found]
    if len(locations) == 1:
        return locations[0]
    shown = locations[:_NAMED] + ([f"{len(locations) - _NAMED} more"] if len(locations) > _NAMED else [])
    return f"{'; '.join(shown)}. Of the first"


def _when(finding: Finding) -> str:
    return f"steps {finding.first} to {finding.last}" if finding.last > finding.first else f"step {finding.first}"


def published(run: Run) -> tuple[Reference, ...]:
    """Return published reference values for runs that are evaluated on AIME 2024."""
    return AIME_2024 if re.search(r"aime.?(20)?24", str(run.setting("data.validation") or ""), re.IGNORECASE) else ()


def progress(run: Run) -> str:
    """Return steps and minutes; for an unfinished run also the total steps."""
    steps = int(run.trained[-1]["step"])
    seconds = run.summary.get("wall_seconds", run.trained[-1].get("wall_seconds"))
    took = f" in {seconds / 60:.1f} minutes" if seconds is not None else ""
    total = run.count("trainer.max_steps")
    remaining = f" of {total}, not finished" if not run.summary and total else ""
    return f"{steps} steps{remaining}{took}"


def _terminal_tables(series: Sequence[Series]) -> list[str]:
    """Return one run's table and progress, or a table with one line per series."""
    alone = _alone(series)
    head, lines = before_after(alone) if alone else comparison(series)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, name in enumerate([run_name(alone), *head[1:]] if alone else head):
        shown.add_column(name, justify="right" if index else "left", overflow="fold")
    for line in lines:
        shown.add_row(*line)
    return [terminal_text(shown), *([progress(alone)] if alone else [])]


def _alone(series: Sequence[Series]) -> Run | None:
    """Return the run if there is only one, else None."""
    return series[0].runs[0] if len(series) == 1 and len(series[0].runs) == 1 else None


def run_name(run: Run) -> str:
    """Return the run's name."""
    return str(run.setting("run.name") or run.directory.resolve().name)


def _write_figures(series: Sequence[Series], folder: Path) -> dict[str, bytes]:
    """Write PNGs by name to `folder`; remove earlier ones that have no data any more."""
    references = tuple(dict.fromkeys(r for one in series for run in one.runs for r in published(run)))
    folder.mkdir(parents=True, exist_ok=True)
    for name in former_names.FIGURES:
        (folder / f"{name}.png").unlink(missing_ok=True)
    figures = {}
    for spec in (spec for specs in SECTIONS.values() for spec in specs):
        png = _draw(spec, series, references)
        if png is None:
            (folder / f"{spec.name}.png").unlink(missing_ok=True)
        else:
            write_atomically(folder / f"{spec.name}.png", png)
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


_SMOOTHED_NOTE = "Long runs: bold lines are running means over about 1% of the steps, pale lines the values."


def _summary(series: Sequence[Series]) -> str:
    """Return one run's progress and table, or a line per series with a foldable table for each run."""
    alone = _alone(series)
    if alone:
        return f"<p>{escape(progress(alone))}. {_SMOOTHED_NOTE}</p>\n{_before_after(alone)}"
    spread = (
        " Repeated runs: mean ± sample standard deviation; figures show the mean and, pale, its 95% t interval. Both "
    )
    spread += "are over the steps that all repeats have."
    note = spread if any(one.low is not None for one in series) else ""
    head, lines = comparison(series)
    named = [[Html(_swatch(one) + escape(name)), *cells] for one, (name, *cells) in zip(series, lines, strict=True)]
    each = [
        f"<section><h3>{_swatch(one)}{escape(run_name(run))}</h3><p>{escape(progress(run))}</p>{_before_after(run)}</section>"
        for one in series
        for run in one.runs
    ]
    return (
        f"<p>Each colour is a run.{note}</p>\n{table(head, named)}\n"
        f"<details><summary>Before and after, per run</summary><div class=grid>{''.join(each)}</div></details>"
    )


def _swatch(series: Series) -> str:
    return f'<span class=swatch style="background:{escape(series.color)}"></span>'


def _before_after(run: Run) -> str:
    head, lines = before_after(run)
    return table(head, lines)


def _health(found: Sequence[tuple[str, Finding]], alone: bool) -> str:
    if not found:
        return "<h2>Health</h2>\n<p>No findings.</p>"
    items = "\n".join(
        f"<li><b>{escape(_when(finding).capitalize() if alone else where)}</b>: "
        f"{escape(finding.text)} <small>({escape(_SOURCES[finding.rule.source])})</small></li>"
        for where, finding in found
    )
    return f"<h2>Health</h2>\n<ul>\n{items}\n</ul>"


_SOURCES = {"paper": "from the paper", "code": "from the authors' code", "choice": "project rule"}


def _latest(runs: Sequence[Run]) -> str:
    """Return the latest value of every metric, as in metrics.jsonl."""
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
