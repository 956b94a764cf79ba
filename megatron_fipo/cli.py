"""The `megatron-fipo` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_fipo.config import Config, load_config

app = typer.Typer(
    help="Train reasoning models with FIPO on Megatron-Core.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Problem files.", no_args_is_help=True)
app.add_typer(data, name="data")

ConfigFile = Annotated[Path, typer.Argument(help="YAML file; see examples/.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, as many as you like.", metavar="[KEY=VALUE]...")
]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check config, layout, data and tokenizer, and run one made-up update.")
    ] = False,
) -> None:
    """Train a policy. Starts its own ranks unless torchrun or srun already did."""
    from megatron_fipo import launch
    from megatron_fipo.checks import check_run
    from megatron_fipo.run_log import prepare_directory

    settings = load_config(config, overrides or ())
    for warning in check_run(settings):
        typer.secho(f"warning: {warning}", fg="yellow", err=True)
    if dry_run:
        launch.run(_dry_run_rank, settings.parallel, (settings,))
        return
    if launch.is_first_process():
        prepare_directory(settings)
    launch.run(_train_rank, settings.parallel, (settings,))
    if launch.is_first_process():
        _report(settings.run_directory)


@data.command()
def prepare(
    input: Annotated[Path, typer.Argument(help="Published parquet file in the DAPO schema.")],
    output: Annotated[Path, typer.Argument(help="Where to write the checked, de-duplicated file.")],
    validation_fraction: Annotated[float, typer.Option(help="Share of problems held out in a file beside it.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the held-out split.")] = 0,
) -> None:
    """Check a published problem file, take every problem once, and hold some out."""
    from megatron_fipo.data import prepare as prepare_file

    done = prepare_file(input, output, validation_fraction, seed)
    typer.echo(f"{done.num_rows} rows, {done.num_unique} different prompts, {done.num_contradictory} left out")
    for name, file in done.files.items():
        typer.echo(f"{output.parent / name}: {file.rows} problems, sha256 {file.sha256}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run's directory.")]) -> None:
    """Draw a run's figures: <run>/report.html and <run>/figures/."""
    _report(run)


@app.command()
def doctor() -> None:
    """Say what this machine has, what is missing, and what that costs."""
    from megatron_fipo.doctor import diagnose

    diagnose()


def _train_rank(config: Config) -> None:
    trainer = _trainer(config)
    try:
        trainer.train()
    finally:
        trainer.close()


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


def _trainer(config: Config, write: bool = True) -> Any:
    from megatron_fipo.trainer import Trainer

    return Trainer(config, write=write)


def _report(run: Path) -> None:
    from megatron_fipo.report.page import write_report

    typer.echo(write_report(run))


def main() -> None:
    """Entry point: a ValueError is the user's to mend (exit code 2); a failed rank shows its own traceback (1)."""
    from megatron_fipo.launch import RankFailure

    try:
        app()
    except ValueError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)
    except RankFailure as error:
        typer.secho(str(error), fg="red", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
