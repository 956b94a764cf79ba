"""The `megatron-fipo` command."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_fipo.arguments import CheckpointOverrides, ConfigFile
from megatron_fipo.comparison.command import compare
from megatron_fipo.config import Config, checkpoint_setting, load_config, with_seed
from megatron_fipo.convert_command import app as convert
from megatron_fipo.exit_codes import BAD_INPUT, EXIT_CODES, RUN_AGAIN, Interrupted, RankFailure
from megatron_fipo.mismatch.command import mismatch
from megatron_fipo.printable import printable
from megatron_fipo.scaling.command import app as scaling

app = typer.Typer(
    help="Train reasoning models with FIPO on Megatron-Core.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Problem files.", no_args_is_help=True)
app.add_typer(data, name="data")
app.add_typer(convert, name="convert")
app.add_typer(scaling, name="scaling")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="section.key=value; `megatron-fipo settings` lists them.", metavar="[KEY=VALUE]..."),
]

Seed = Annotated[
    int | None,
    typer.Option(help="run.seed of one of several repeats; -seedN is appended to the run's name and directory.", min=0),
]


@app.command(epilog=EXIT_CODES)
def train(
    config: Annotated[str | None, typer.Argument(help="YAML file; see examples/.", metavar="CONFIG")] = None,
    overrides: Overrides = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Default of CONFIG, for batch scripts that pass on only KEY=VALUE.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check config, layout, data and tokenizer, and run one optimizer step on random data."
        ),
    ] = False,
    seed: Seed = None,
) -> None:
    """Train a policy. Starts its own ranks unless torchrun or srun already did."""
    from megatron_fipo import launch

    settings = with_seed(load_config(*_config_and_overrides(config, overrides or [], recipe)), seed)
    if launch.is_first_process():  # once, and not by hundreds of tasks at the same time
        with launch.checked(settings.run_directory, settings.resume.max_requeues):
            _warn(launch.in_own_process(_check, settings, dry_run))
    if dry_run and (obstacle := _obstacle_to_update(settings)):
        if launch.is_first_process():
            typer.echo(f"dry run: everything that needs no GPU passed; no update was run, since {obstacle}")
        return
    if dry_run:
        launch.run(_dry_run_rank, settings.parallel, (settings,), deterministic=settings.run.deterministic)
        return
    launch.run(
        _train_rank,
        settings.parallel,
        (settings,),
        run_directory=settings.run_directory,
        max_requeues=settings.resume.max_requeues,
        deterministic=settings.run.deterministic,
        requirements=launch.requirements(settings, {"data.train": settings.data.train, **_benchmarks(settings)}),
    )
    if launch.is_first_process():
        _report(settings.run_directory)


@app.command("eval", epilog=EXIT_CODES)
def evaluate(
    config: ConfigFile,
    overrides: CheckpointOverrides = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for every sample and the figures; runs/NAME/evaluation/CHECKPOINT if not given."),
    ] = None,
    seed: Seed = None,
) -> None:
    """Avg@k, Cons@k and Pass@k on the config's validation problems. The last line is one JSON object.

    Finished samples are kept: the same command resumes. More samples, problems or benchmarks are added to them.
    """
    from megatron_fipo import launch

    settings = with_seed(load_config(config, [checkpoint_setting(text) for text in overrides or ()]), seed)
    if not settings.data.benchmarks:
        raise ValueError("data.validation must name the problem file to evaluate on")
    directory = out or settings.evaluation_directory

    def progress() -> launch.Progress:
        from megatron_fipo.evaluation.store import Store

        return launch.Progress(Store(directory).count(), "samples")

    if launch.is_first_process():
        with launch.checked(directory, settings.resume.max_requeues, progress):
            _warn(launch.in_own_process(_check_evaluation, settings, directory))
    launch.run(
        _evaluate_rank,
        settings.parallel,
        (settings, directory),
        run_directory=directory,
        max_requeues=settings.resume.max_requeues,
        progress=progress,
        deterministic=settings.run.deterministic,
        requirements=launch.requirements(settings, _benchmarks(settings)),
    )


def _check_evaluation(config: Config, directory: Path) -> list[str]:
    """Return warnings."""
    from megatron_fipo.checks import check_evaluation
    from megatron_fipo.evaluation import command

    warnings = check_evaluation(config)
    command.check(config, directory)
    return warnings


def _benchmarks(config: Config) -> dict[str, str]:
    """Return the benchmarks' files by the setting that names them, as messages do."""
    return {f"data.validation {name}": file for name, file in config.data.benchmarks.items()}


def _config_and_overrides(config: str | None, overrides: list[str], recipe: Path | None) -> tuple[Path, list[str]]:
    """Return the config file and the overrides: with a recipe, the first argument may be an override."""
    if recipe is not None and (config is None or "=" in config):
        return recipe, [config, *overrides] if config is not None else overrides
    if config is None:
        raise ValueError("train needs a config file; see examples/")
    return Path(config), overrides


def _check(config: Config, dry_run: bool) -> list[str]:
    """Return warnings."""
    from megatron_fipo.checks import check_run
    from megatron_fipo.resume import check_directory
    from megatron_fipo.scaling.cost.hardware import local_hardware
    from megatron_fipo.scaling.planner.checkpoint_space import check_space
    from megatron_fipo.scaling.planner.memory_check import check_memory

    warnings = check_run(config, needs_gpu=not dry_run)
    if (hardware := local_hardware()) is not None:
        warnings += check_memory(config, hardware)
    if not dry_run:
        check_directory(config)
        warnings += check_space(config)
    return warnings


def _obstacle_to_update(config: Config) -> str | None:
    """Return why this machine, such as a login node, cannot run an update of a valid configuration; None if it can."""
    from megatron_fipo import launch

    obstacle = launch.in_own_process(_gpu_obstacle) if config.model.transformer_engine == "on" else None
    return obstacle and f"model.transformer_engine=on needs a GPU and {obstacle}"


def _gpu_obstacle() -> str | None:
    from megatron_fipo.fused_kernels import gpu_obstacle

    return gpu_obstacle()


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        typer.secho(printable(f"warning: {warning}"), fg="yellow", err=True)


@data.command()
def prepare(
    input: Annotated[
        str, typer.Argument(help="dapo-math-17k, aime-2024 or aime-2025 from the Hugging Face hub, or a problem file.")
    ],
    output: Annotated[Path, typer.Argument(help="Where to write the checked, de-duplicated parquet file.")],
    validation_fraction: Annotated[
        float, typer.Option(help="Share of problems to hold out, in another file beside it.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the held-out split.")] = 0,
) -> None:
    """Check a problem file, remove duplicates, and optionally hold some problems out.

    A problem file is parquet in the schema of DAPO-Math-17k, or parquet or JSON lines with a problem and an answer per
    row, which get DAPO's prompt.
    """
    from megatron_fipo.data import prepare as prepare_file

    done = prepare_file(input, output, validation_fraction, seed)
    typer.echo(
        f"{done.num_rows} rows, {done.num_unique} different prompts, "
        f"{done.num_contradictory} dropped since their rows disagree on the answer"
    )
    for name, file in done.files.items():
        typer.echo(f"{output.parent / name}: {file.rows} problems, sha256 {file.sha256}")


@data.command("check")
def check_data(
    config: ConfigFile,
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(help="Number of prompts to show.")] = 3,
) -> None:
    """Show some prompts as the model will see them, where a response ends, and how the reward scores answers."""
    from megatron_fipo.data_check import show

    for line in show(load_config(config, overrides or []), prompts):
        typer.echo(printable(line))


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories; several are compared in each figure.", metavar="RUN...")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File of the page; default: <run>/report.html of one run, ./report.html of several."),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(
            help="Prefix of the names of runs that are repeats, drawn as their mean; so are NAME-seed1, NAME-seed2."
        ),
    ] = None,
) -> None:
    """Draw the figures of one run or of several, and a page with all of them."""
    _report(runs, out, group or ())


app.command(epilog=EXIT_CODES)(compare)
app.command(epilog=EXIT_CODES)(mismatch)


@scaling.command("report", epilog=EXIT_CODES)
def report_scaling(
    directory: Annotated[Path, typer.Argument(help="Output directory of `scaling run` or `scaling sweep`.")],
    out: Annotated[Path | None, typer.Option(help="HTML page to write; default: DIRECTORY/report.html.")] = None,
) -> None:
    """Compare measured layouts, also of an unfinished sweep: a table, DIRECTORY/figures/, and an HTML page."""
    from megatron_fipo.report.scaling_page import write_scaling_report

    typer.echo(write_scaling_report(directory, out))


@app.command()
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file: also report whether `train` could start it.", metavar="[CONFIG]")
    ] = None,
    overrides: Overrides = None,
    login_node: Annotated[
        bool, typer.Option("--login-node", help="Check the installation for jobs on GPU nodes; no GPU is needed here.")
    ] = False,
) -> None:
    """Report what this machine has, what is missing, and the cost of that.

    With CONFIG the last lines report whether the recipe is ready, what is missing, and what to run. Exit code 0: ready;
    1: not ready; 2: the file or a setting is wrong.
    """
    from megatron_fipo import doctor

    settings = None if config is None else load_config(config, overrides or [])
    doctor.diagnose()
    if settings is not None:
        raise typer.Exit(0 if doctor.check_recipe(settings, str(config), login_node) else 1)


@app.command("settings", epilog=EXIT_CODES)
def show_settings(
    name: Annotated[
        str | None, typer.Argument(help="A section or a setting, e.g. rollout.server; the sections if not given.")
    ] = None,
) -> None:
    """Print settings: their defaults, allowed values, and whether they may change when a run resumes."""
    from megatron_fipo.config.describe import describe

    for line in describe(name):
        typer.echo(line)


def _train_rank(config: Config) -> None:
    trainer = _trainer(config, resume=True)
    try:
        trainer.train()
    finally:
        trainer.close()


def _evaluate_rank(config: Config, directory: Path) -> None:
    from megatron_fipo.evaluation import command

    command.run(config, directory)


def _dry_run_rank(config: Config) -> None:
    trainer = _trainer(config, write=False)
    try:
        metrics = trainer.dry_run()
    finally:
        trainer.close()
    if trainer.topology.rank == 0:
        typer.echo(
            f"dry run passed: one update, gradient norm {metrics['policy/grad_norm']:.3g}, "
            f"first log-ratio {metrics['policy/first_log_ratio_abs_max']:.1g}"
        )


def _trainer(config: Config, write: bool = True, resume: bool = False) -> Any:
    from megatron_fipo.trainer import Trainer

    return Trainer(config, write=write, resume=resume)


def _report(runs: Path | Sequence[Path], out: Path | None = None, groups: Sequence[str] = ()) -> None:
    from megatron_fipo.report.page import write_report

    typer.echo(write_report(runs, out, groups))


def main() -> None:
    """Run the command. A ValueError is a user error; a failed rank shows its own traceback."""
    # Slurm's signal ahead of a job's end is for ranks; what runs before and after them may finish.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        app()
    except ValueError as error:
        typer.secho(printable(f"error: {error}"), fg="red", err=True)
        sys.exit(BAD_INPUT)
    except RankFailure as error:
        if not error.shown:
            typer.secho(printable(error), fg="red", err=True)
        sys.exit(error.exit_code)
    except Interrupted as error:
        if str(error):
            typer.echo(error, err=True)
        sys.exit(RUN_AGAIN)


if __name__ == "__main__":
    main()
