"""Report of a scaling study: self-contained <study>/report.html, <study>/figures/*.png, a terminal table.

A study is a directory with `rows/*.json`, one per measured layout, optionally `plan.csv` of planned layouts, and
`traces/NAME.json`. It may still be in progress.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median
from urllib.parse import quote

from rich import box
from rich.table import Table

from megatron_fipo.atomic_file import write_atomically
from megatron_fipo.printable import printable
from megatron_fipo.report import scaling_findings as findings
from megatron_fipo.report.parts import Html, document, figure, table, terminal_text
from megatron_fipo.report.scaling_figures import FIGURES
from megatron_fipo.scaling.cost.layout import Layout
from megatron_fipo.scaling.measure.row_reader import STATUSES, MeasuredRow, read_rows
from megatron_fipo.scaling.pipeline import timeline_figure
from megatron_fipo.scaling.planner.plan_csv import read_plan

_PAGE_BYTES = 4_500_000  # size limit of embedded figures; further timelines are only linked
_LISTED = 20  # maximum number of unmeasured layouts listed
_MORE_STYLE = """
.wide table { white-space: nowrap } .wide figure { max-width: none; min-width: 40rem }
td.error { white-space: normal; min-width: 14rem; max-width: 40rem }
"""


@dataclass(frozen=True)
class Study:
    """Data of a study. `planned`: layouts of its plan.csv; `warnings`: what could not be read."""

    directory: Path
    rows: list[MeasuredRow]
    planned: list[Layout]
    warnings: list[str]

    @property
    def pending(self) -> list[Layout]:
        return findings.pending(self.planned, self.rows)


def write_scaling_report(directory: Path, out: Path | None = None) -> str:
    """Write a study's figures and page, also of one in progress; return the text to print.

    Args:
        out: path of the page; None: report.html in the study.

    Raises:
        ValueError: there is no readable row, or the page cannot be written.
    """
    study = read_study(directory)
    page = out or directory / "report.html"
    try:
        drawn = _write_figures(study)
        write_atomically(page, _page(study, drawn, page.parent))
    except OSError as error:
        raise ValueError(f"cannot write {page} or {directory / 'figures'}: {error}") from None
    return printable("\n".join([*(f"warning: {w}" for w in study.warnings), terminal_table(study), f"report: {page}"]))


def read_study(directory: Path) -> Study:
    """Read a study; raise ValueError if there is no readable row."""
    rows, warnings = read_rows(directory)
    planned, more = _read_plan(directory / "plan.csv")
    return Study(directory, findings.ranked(rows), planned, warnings + more)


def _read_plan(file: Path) -> tuple[list[Layout], list[str]]:
    """Return the layouts of the plan if it exists; a damaged plan is only a warning, since rows are self-contained."""
    if not file.is_file():
        return [], []
    try:
        return read_plan(file), []
    except ValueError as error:
        return [], [str(error)]


def summary(study: Study) -> str:
    """Return a sentence with the counts of layouts by status, and the planner's accuracy."""
    counts = [sum(r.status == status for r in study.rows) for status in STATUSES]
    text = ", ".join(f"{n} {name}" for n, name in zip(counts, ("measured", "out of memory", "failed"), strict=True))
    if study.planned:
        text += f"; {len(study.pending)} of the plan's {len(study.planned)} layouts not measured yet"
    errors = [
        abs(r.predicted.seconds / r.seconds - 1) for r in study.rows if r.ok and r.seconds and r.predicted.seconds
    ]
    if errors:
        text += f"; error of predicted times: {median(errors):.1%} (median of {len(errors)})"
    return text


def terminal_table(study: Study) -> str:
    """Return a table of at most 100 columns; * marks the best layout at its number of GPUs."""
    best = {b.row.name for b in findings.best_layouts(study.rows)}
    tables = []
    for setting in findings.settings(study.rows):
        shown = Table(title=" ".join(setting), box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
        for column in ("GPUs", "layout", "tokens", "s", "tok/s/GPU", "MFU", "bubble", "GB", "predicted s", "status"):
            left = column in ("layout", "status")
            shown.add_column(column, justify="left" if left else "right", overflow="fold")
        for row in (r for r in study.rows if r.setting == setting):
            shown.add_row(*_terminal_cells(row, row.name in best))
        tables.append(shown)
    pending = [f"not measured yet: {line}" for line in _pending_lines(study)]
    return terminal_text(*tables, summary(study), *pending)


def _terminal_cells(row: MeasuredRow, best: bool) -> list[str]:
    return [
        f"{row.layout.gpus:,}" + ("*" if best else ""),
        row.layout.label,
        f"{row.layout.tokens_per_micro_batch:,}",
        *_measured(row),
        _cell(row.predicted.seconds, ".3g"),
        row.status.replace("_", " "),
    ]


def _measured(row: MeasuredRow) -> list[str]:
    memory = None if row.peak_memory is None else row.peak_memory / 1e9
    return [
        _cell(row.seconds, ".3g"),
        _cell(row.tokens_per_second_per_gpu, ",.0f"),
        _cell(row.mfu, ".1%"),
        _cell(row.bubble_fraction, ".1%"),
        _cell(memory, ".3g"),
    ]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _pending_lines(study: Study) -> list[str]:
    lines = [f"{p.gpus:,} GPUs, {p.label}, {p.tokens_per_micro_batch:,} tokens" for p in study.pending]
    return lines[:_LISTED] + ([f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else [])


# Figures


@dataclass(frozen=True)
class _Drawn:
    """PNGs by name, and the rows with timelines."""

    figures: Mapping[str, bytes]
    timelines: Sequence[tuple[MeasuredRow, str, bytes]]  # row, file, PNG


def _write_figures(study: Study) -> _Drawn:
    """Write the figures to <study>/figures; remove earlier ones without data."""
    folder = study.directory / "figures"
    folder.mkdir(exist_ok=True)
    pngs = {f.name: png for f in FIGURES if (png := f.draw(study.rows)) is not None}
    lines = _draw_timelines(study.rows)
    files = {f"{name}.png": png for name, png in pngs.items()} | {file: png for _, file, png in lines}
    for file, png in files.items():
        write_atomically(folder / file, png)
    for old in (*(folder / f"{f.name}.png" for f in FIGURES), *folder.glob("timeline_*.png")):
        if old.name not in files:
            old.unlink(missing_ok=True)
    return _Drawn(pngs, lines)


def _draw_timelines(rows: Sequence[MeasuredRow]) -> list[tuple[MeasuredRow, str, bytes]]:
    label = findings.labels(rows)
    drawn = []
    for number, row in enumerate(findings.shown_timelines(rows), start=1):
        assert row.timeline is not None
        drawn.append((row, f"timeline_{number}.png", timeline_figure.png(row.timeline, label[row.name])))
    return drawn


# Page


def _page(study: Study, drawn: _Drawn, where: Path) -> str:
    """Return the page; `where`: directory that links are relative to."""
    left = _PAGE_BYTES - sum(4 * len(png) // 3 for png in drawn.figures.values())
    figures = "\n".join(figure(f.title, f.caption, drawn.figures[f.name]) for f in FIGURES if f.name in drawn.figures)
    body = f"""<p>{escape(summary(study))}.</p>
{_list("Not read", study.warnings)}
<h2>Best layout at each number of GPUs</h2>
{_best_table(study)}
<h2>Figures</h2>
<div class=grid>
{figures}
</div>
<h2>All layouts</h2>
{_rows_table(study, where)}
{_timeline_section(study, drawn, where, left)}
{_list("Not measured yet", _pending_lines(study))}
<h2>Environment</h2>
{_environment_table(study.rows)}"""
    return document(study.directory.resolve().name, body, _MORE_STYLE)


def _best_table(study: Study) -> str:
    label = findings.labels([b.row for b in findings.best_layouts(study.rows)])
    lines = [
        [
            f"{b.row.layout.gpus:,}",
            label[b.row.name],
            f"{b.row.layout.tokens_per_micro_batch:,}",
            *_measured(b.row),
            f"{b.efficiency:.1%}",
            str(b.others),
        ]
        for b in findings.best_layouts(study.rows)
    ]
    if not lines:
        return "<p>No layout has been measured.</p>"
    head = ["GPUs", "layout", "tokens", "s", "tokens/s/GPU", "MFU", "bubble", "GB", "efficiency", "other layouts"]
    return table(head, lines, {1: "text"})


def _rows_table(study: Study, where: Path) -> str:
    head = ["GPUs", "layout", "model", "GPU", "loss", "tokens", "micro-batches", "s", "tokens/s/GPU", "MFU", "bubble"]
    head += ["GB", "closed form", "predicted s", "predicted bubble", "predicted GB", "status", "trace"]
    lines = []
    for row in study.rows:
        memory = None if row.predicted.memory_bytes is None else row.predicted.memory_bytes / 1e9
        cells = [
            f"{row.layout.gpus:,}",
            row.layout.label,
            row.model,
            row.gpu,
            row.loss,
            f"{row.layout.tokens_per_micro_batch:,}",
            _cell(row.micro_batches, ",d"),
            *_measured(row),
            _cell(row.closed_form, ".1%"),
            _cell(row.predicted.seconds, ".3g"),
            _cell(row.predicted.bubble, ".1%"),
            _cell(memory, ".3g"),
            row.status.replace("_", " ") + (f": {row.error}" if row.error else ""),
        ]
        lines.append([*cells, _trace_link(study.directory, row, where)])
    return table(head, lines, {1: "text", 2: "text", 3: "text", 16: "text error"})


def _trace_link(directory: Path, row: MeasuredRow, where: Path) -> str:
    trace = directory / "traces" / f"{row.name}.json"
    if Path(row.name).name != row.name or not trace.is_file():
        return "-"
    return Html(f'<a href="{escape(quote(os.path.relpath(trace, where)))}">trace</a>')


def _timeline_section(study: Study, drawn: _Drawn, where: Path, left: int) -> str:
    parts = []
    for row, file, png in drawn.timelines:
        left -= 4 * len(png) // 3
        caption = f"{row.name}: {_cell(row.seconds, '.4g')} s per update (median step)."
        if left > 0:
            parts.append(figure(row.name, caption, png))
        else:
            link = escape(quote(os.path.relpath(study.directory / "figures" / file, where)))
            parts.append(f'<p><a href="{link}">{escape(row.name)}</a></p>')
    if not parts:
        return ""
    note = "The fastest layout, the slowest, and the fastest for each number of stages. Traces open in ui.perfetto.dev."
    return f"<h2>Timelines</h2>\n<p>{note}</p>\n<div class=wide>\n" + "\n".join(parts) + "\n</div>"


def _environment_table(rows: Sequence[MeasuredRow]) -> str:
    """Return a table of facts with all their values, of which there should be one each."""
    names = dict.fromkeys(name for row in rows for name in row.environment)
    lines = []
    for name in names:
        values = dict.fromkeys(row.environment[name] for row in rows if name in row.environment)
        shown = list(values)[:3] + ([f"and {len(values) - 3} others"] if len(values) > 3 else [])
        lines.append([name, "; ".join(shown)])
    return table(["", ""], lines, {1: "text error"}) if lines else "<p>Unknown.</p>"


def _list(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return f"<h2>{title}</h2>\n<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>"
