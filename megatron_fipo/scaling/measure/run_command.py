"""`megatron-fipo scaling run` and `scaling sweep`: measure layouts on real ranks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_fipo.config import Config, load_config
from megatron_fipo.exit_codes import EXIT_CODES, NOT_MEASURED, RankFailure
from megatron_fipo.printable import printable
from megatron_fipo.scaling.measure.specification import (
    FINISHED,
    Loss,
    Measurement,
    is_finished,
    measured_config,
    read_row,
)

if TYPE_CHECKING:
    from megatron_fipo.scaling.cost.hardware import Hardware
    from megatron_fipo.scaling.cost.sequence_lengths import Sequences

EPILOG = f"{EXIT_CODES} {NOT_MEASURED}: out of memory or failed; see the row."
_POLL_SECONDS = 0.25  # interval of reading the ranks' progress

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="section.key=value.")]
Out = Annotated[Path | None, typer.Option(help="Directory of rows/ and traces/; default: runs/scaling.")]
Steps = Annotated[int, typer.Option(min=1, help="Measured updates.")]
WarmUp = Annotated[int, typer.Option(min=0, help="Warm-up updates before them.")]
LossName = Annotated[str, typer.Option(help="fipo: the config's algorithm.loss; lm: next-token cross-entropy.")]
Lengths = Annotated[
    str | None, typer.Option(help="Sequence lengths in tokens: 4096, or 800,1200,..., or p50=3000,p90=9000,p100=20480.")
]
Rollouts = Annotated[Path | None, typer.Option(help="Sequence lengths from rollouts/step_N.parquet of a run.")]
GPUName = Annotated[str, typer.Option(help="GPU for prediction and MFU; ignored without a GPU.")]
Calibration = Annotated[Path | None, typer.Option(help="Calibration file for --gpu, which may then be a CPU.")]
MemoryGB = Annotated[float | None, typer.Option(help="Memory limit per rank; on a CPU, above its initial memory.")]
Again = Annotated[bool, typer.Option("--again", help="Measure again even if there is a finished row.")]


def run(
    config: Annotated[str, typer.Argument(help="Run config (YAML). A model without safetensors gets random weights.")],
    overrides: Overrides = None,
    plan: Annotated[
        Path | None, typer.Option(help="CSV of `scaling plan --csv`, whose layout replaces CONFIG's.")
    ] = None,
    row: Annotated[int | None, typer.Option(help="Line of --plan, counted from 1.")] = None,
    out: Out = None,
    steps: Steps = 5,
    warmup: WarmUp = 2,
    loss: LossName = "fipo",
    lengths: Lengths = None,
    rollouts: Rollouts = None,
    gpu: GPUName = "H100-80",
    calibration: Calibration = None,
    memory_gb: MemoryGB = None,
    again: Again = False,
) -> None:
    """Measure one layout: real updates of the real model on random responses.

    Starts its own ranks unless torchrun or srun already did. The row in OUT/rows has time, bubble, memory and the
    prediction; OUT/traces has a Chrome trace of all stages.
    """
    if (plan is None) != (row is None):
        raise ValueError("--plan FILE.csv and --row N must be given together")
    settings = _with_plan(load_config(config, overrides or []), plan, row)
    directory = out or Path("runs/scaling")
    measurement = make_measurement(
        settings, directory, steps, warmup, loss, lengths, rollouts, gpu, calibration, memory_gb
    )
    given = lengths is not None or rollouts is not None
    measure(measurement, given, planned=plan is not None, again=again)


def make_measurement(
    config: Config,
    directory: Path,
    steps: int,
    warmup: int,
    loss: str,
    lengths: str | None,
    rollouts: Path | None,
    gpu: str,
    calibration: Path | None,
    memory_gb: float | None = None,
) -> Measurement:
    """Build the measurement from the options.

    Raises:
        ValueError: an option is invalid.
    """
    return Measurement(
        config=config,
        sequences=_sequences(config, lengths, rollouts),
        loss=loss_name(loss),
        gpu=gpu_name(gpu, calibration),
        hardware=_hardware(gpu, calibration),
        directory=directory,
        steps=steps,
        warmup=warmup,
        memory_bytes=_memory_bytes(memory_gb),
    )


def measure(measurement: Measurement, lengths_given: bool, planned: bool, again: bool) -> None:
    """Measure and write the row, unless a finished row exists.

    Raises:
        ValueError: the layout is illegal, or the existing row is of a different update.
        typer.Exit: with NOT_MEASURED; the row has the reason.
    """
    from megatron_fipo import launch
    from megatron_fipo.scaling.measure.row_writer import prepare_notes, write_failed_row, write_finished_row

    first, found = launch.is_first_process(), read_row(measurement.row_path)
    if found is not None and is_finished(found) and not again:
        _skip(measurement, found, first)
        return
    try:
        measurement = _validated(measurement, lengths_given)
    except ValueError as error:
        if planned and first:
            write_failed_row(measurement, " ".join(str(error).split()))
        raise
    if first:
        prepare_notes(measurement)
    try:
        _launch(measurement, first)
    except (RuntimeError, ValueError) as error:  # a RankFailure, or under torchrun the rank's own error
        if first:
            _report_failure(error, write_failed_row(measurement, str(error)))
        raise
    if first:
        show_row(write_finished_row(measurement))


def _validated(measurement: Measurement, lengths_given: bool) -> Measurement:
    """Return the measurement with its effective config.

    Raises:
        ValueError: layout, model and lengths do not fit together.
    """
    _check_layout(measurement)
    longest = measurement.sequences.longest if lengths_given else None
    measurement = replace(measurement, config=measured_config(measurement.config, measurement.loss, longest))
    _check_model(measurement)
    return measurement


def _report_failure(error: Exception, row: dict[str, Any]) -> None:
    """Show a failed row and exit, unless the error is a user error.

    Raises:
        typer.Exit: with NOT_MEASURED, unless it is a user error.
    """
    if isinstance(error, ValueError):
        return
    if not (isinstance(error, RankFailure) and error.shown):
        typer.secho(str(error), fg="red", err=True)
    show_row(row)
    raise typer.Exit(NOT_MEASURED) from None


def _launch(measurement: Measurement, first: bool) -> None:
    from megatron_fipo import launch
    from megatron_fipo.scaling.measure.rank import measure_rank

    with _progress(measurement, first):
        config = measurement.config
        launch.run(measure_rank, config.parallel, (measurement,), deterministic=config.run.deterministic)


def _skip(measurement: Measurement, row: dict[str, Any], first: bool) -> None:
    tokens = measurement.sequences.tokens
    if row.get("tokens") != tokens:
        raise ValueError(
            f"{measurement.row_path} was measured with {row.get('tokens')} tokens per update, but this one has "
            f"{tokens}: choose another --out, or measure again with --again"
        )
    if first:
        typer.echo(f"{measurement.row_path} already exists: {row['status']}")
    if row["status"] != FINISHED[0]:
        raise typer.Exit(NOT_MEASURED)


def _check_layout(measurement: Measurement) -> None:
    """Raise ValueError if the layout does not fit the model, with the arithmetic."""
    from megatron_fipo.scaling.planner.legal_layouts import layout_problems
    from megatron_fipo.scaling.planner.run_inputs import model_of

    problems = layout_problems(model_of(measurement.config), measurement.config.parallel)
    if problems:
        raise ValueError("the layout does not fit the model:\n" + "\n".join(f"  - {p}" for p in problems))


def _check_model(measurement: Measurement) -> None:
    """Raise ValueError on unsupported models, missing kernels, or a sequence longer than a micro-batch."""
    from megatron_fipo.fused_kernels import check_context_parallelism
    from megatron_fipo.model.check import check_model
    from megatron_fipo.shapes.micro_batches import plan_micro_batches

    check_model(measurement.config)
    check_context_parallelism(measurement.config)
    p = measurement.config.parallel
    plan_micro_batches(
        measurement.sequences.lengths,
        replicas=p.data,
        token_budget=measurement.config.trainer.tokens_per_micro_batch,
        alignment=p.sequence_alignment,
    )


def _with_plan(config: Config, plan: Path | None, row: int | None) -> Config:
    from megatron_fipo.scaling.planner.plan_csv import plan_line

    return config if plan is None or row is None else plan_line(plan, row).applied(config)


def _sequences(config: Config, lengths: str | None, rollouts: Path | None) -> Sequences:
    from megatron_fipo.scaling.cost.sequence_lengths import parse_lengths, read_rollouts
    from megatron_fipo.scaling.planner import run_inputs

    if lengths is not None and rollouts is not None:
        raise ValueError("--lengths and --rollouts are mutually exclusive")
    count = run_inputs.update_sequences(config)
    if rollouts is not None:
        return read_rollouts(rollouts, count)
    return run_inputs.sequences_of(config) if lengths is None else parse_lengths(lengths, count)


def loss_name(name: str) -> Loss:
    """Return the loss; raise ValueError if unknown."""
    if name == "fipo":
        return "fipo"
    if name == "lm":
        return "lm"
    raise ValueError(f"--loss {name!r} must be fipo or lm")


def gpu_name(gpu: str, calibration: Path | None) -> str:
    """Return the hardware's name in rows."""
    from megatron_fipo.machine.gpus import has_gpu

    return gpu if calibration is not None or has_gpu() else "cpu"


def _hardware(gpu: str, calibration: Path | None) -> Hardware | None:
    from megatron_fipo.scaling.cost.hardware import find_hardware

    found = find_hardware(gpu, calibration=calibration)
    return found if gpu_name(gpu, calibration) != "cpu" or calibration is not None else None


def _memory_bytes(gigabytes: float | None) -> float | None:
    if gigabytes is not None and not gigabytes > 0:
        raise ValueError(f"--memory-gb {gigabytes} must be positive")
    return None if gigabytes is None else gigabytes * 1e9


def show_row(row: dict[str, Any]) -> None:
    """Print a row as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", title=printable(row["name"]))
    for name, value in _shown(row):
        table.add_row(name, printable(value))
    Console(width=100, markup=False).print(table)  # no markup: errors may contain brackets


def _shown(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "status", row["status"] if row["error"] is None else f"{row['status']}: {row['error']}"
    yield "tokens per update", f"{row['tokens']:,}"
    if row["status"] == FINISHED[0]:
        yield "seconds", f"{row['seconds']:.4g} (from {min(row['step_seconds']):.4g} to {max(row['step_seconds']):.4g})"
        yield "tokens/s/GPU", f"{row['tokens_per_second_per_gpu']:,.0f}"
        if row["mfu"] is not None:
            yield "MFU", f"{row['mfu']:.1%}"
        simulated, closed = row["simulated_bubble_fraction"], row["closed_form_bubble_fraction"]
        yield "bubble", f"{row['bubble_fraction']:.1%} (simulated {simulated:.1%}, closed form {closed:.1%})"
    if row["predicted"]:
        yield "predicted", f"{row['predicted']['seconds']:.4g} s, {row['predicted']['memory_bytes'] / 1e9:.2f} GB"
    peaks = [peak for peak in row["peak_memory_bytes"] if peak is not None]
    if peaks:
        yield f"peak memory ({row['memory_kind']})", f"{max(peaks) / 1e9:.3g} GB"


@contextmanager
def _progress(measurement: Measurement, first: bool) -> Iterator[None]:
    """Show a progress bar on the launcher's terminal, from rank 0's progress file."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not first or not console.is_terminal:
        yield
        return
    total, ended = measurement.warmup + measurement.steps, threading.Event()
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(measurement.name, total=total)

        def poll() -> None:
            while not ended.wait(_POLL_SECONDS):
                bar.update(task, completed=(read_row(measurement.notes / "rank_0.json") or {}).get("done", 0))

        thread = threading.Thread(target=poll, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
