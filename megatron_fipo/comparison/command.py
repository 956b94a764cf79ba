"""`megatron-fipo compare`: its arguments and output, without torch and scipy, which are imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_fipo.printable import printable

if TYPE_CHECKING:
    from megatron_fipo.comparison.results import Results
    from megatron_fipo.comparison.runs import PlannedRun
    from megatron_fipo.comparison.spec import Spec


def compare(
    spec: Annotated[
        Path, typer.Argument(help="YAML file with arms, seeds, pairs and endpoints; see docs/comparing.md.")
    ],
    jobs: Annotated[int, typer.Option(min=1, help="Runs that are trained at the same time on this machine.")] = 1,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Train nothing: print the sbatch command of an array, a task for each run.")
    ] = False,
    report_only: Annotated[bool, typer.Option("--report-only", help="Train nothing: report what there is.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Also train runs that failed again; the report counts the attempts.")
    ] = False,
) -> None:
    """Train every arm with every seed, and report which differences between arms are certain.

    Finished runs are kept: the same command continues. OUT/report.html, comparison.json and curves.html are written.
    """
    from megatron_fipo.comparison.runs import check_saved, plan_runs, save_plan
    from megatron_fipo.comparison.spec import read_spec

    if slurm and report_only:
        raise ValueError("--slurm and --report-only exclude each other: one prints a command, one reports")
    read = read_spec(spec)
    runs = plan_runs(read)
    added = check_saved(read, runs)
    if not report_only:
        todo = unfinished(runs, retry_failed)
        if todo:
            _prepare(read, todo)
            save_plan(read, runs)
        if slurm:
            _print_array(read, todo)
            return
        _train(read, todo, jobs)
    _report(read, runs, added)


def unfinished(runs: list[PlannedRun], retry_failed: bool) -> list[PlannedRun]:
    """Return the runs to train."""
    from megatron_fipo.comparison.runs import state_of

    skipped = ("finished",) if retry_failed else ("finished", "failed")
    return [run for run in runs if state_of(run).status not in skipped]


def _prepare(spec: Spec, todo: list[PlannedRun]) -> None:
    from megatron_fipo.comparison.runner import check_arms, prepare

    prepare(spec, todo)
    for warning in check_arms(todo):
        typer.secho(printable(f"warning: {warning}"), fg="yellow", err=True)


def _print_array(spec: Spec, todo: list[PlannedRun]) -> None:
    from megatron_fipo.comparison.runner import array_command

    typer.echo(printable(array_command(spec, todo)) if todo else "every run is finished, or failed")


def _train(spec: Spec, todo: list[PlannedRun], jobs: int) -> None:
    from megatron_fipo.comparison.runner import train_all

    if todo:
        train_all(spec, todo, jobs, lambda text: typer.echo(printable(text)))


def _report(spec: Spec, runs: list[PlannedRun], added: tuple[int, ...]) -> None:
    from megatron_fipo.atomic_file import write_atomically
    from megatron_fipo.comparison.page import comparison_page
    from megatron_fipo.comparison.results import read_results
    from megatron_fipo.comparison.tables import as_json, terminal_report

    results = read_results(spec, runs, added)
    spec.out.mkdir(parents=True, exist_ok=True)
    link = _write_curves(spec, results)
    write_atomically(spec.out / "comparison.json", as_json(results))
    write_atomically(spec.out / "report.html", comparison_page(results, link))
    typer.echo(printable(f"{terminal_report(results)}\nreport: {spec.out / 'report.html'}"))


def _write_curves(spec: Spec, results: Results) -> str:
    """Write the learning curves of all runs that have any; return HTML of a link to them."""
    from megatron_fipo.report.page import write_report

    started = [
        run.directory for run, state in zip(results.runs, results.states, strict=True) if state.status != "missing"
    ]
    shown = [directory for directory in started if _has_steps(directory)]
    if len(shown) < 2:
        return ""
    write_report(shown, spec.out / "curves.html")
    return '<p><a href="curves.html">Learning curves of all runs</a></p>'


def _has_steps(directory: Path) -> bool:
    from megatron_fipo.report.history import read_metrics

    path = directory / "metrics.jsonl"
    return path.is_file() and any(row["step"] > 0 for row in read_metrics(path))
