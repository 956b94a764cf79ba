"""The `megatron-fipo` command."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_fipo.config import Config, load_config, with_seed
from megatron_fipo.outcome import BAD_INPUT, EXIT_CODES, RUN_AGAIN, Interrupted, RankFailure
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
convert = typer.Typer(help="Hugging Face checkpoints to Megatron and back.", no_args_is_help=True)
app.add_typer(convert, name="convert")
app.add_typer(scaling, name="scaling")

Overrides = Annotated[
    list[str] | None, typer.Argument(help="section.key=value, as many as you like.", metavar="[KEY=VALUE]...")
]

Seed = Annotated[
    int | None,
    typer.Option(help="run.seed of one of several repeats; -seedN is appended to the run's name and directory.", min=0),
]


@app.command(epilog=EXIT_CODES)
def train(
    config: Annotated[str | None, typer.Argument(help="YAML file; see examples/.", metavar="CONFIG")] = None,
    overrides: Overrides = None,
    recipe: Annotated[Path | None, typer.Option(help="CONFIG where none is given, before the key=value.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check config, layout, data and tokenizer, and run one made-up update.")
    ] = False,
    seed: Seed = None,
) -> None:
    """Train a policy. Starts its own ranks unless torchrun or srun already did."""
    from megatron_fipo import launch

    settings = with_seed(load_config(*_config_and_overrides(config, overrides or [], recipe)), seed)
    if launch.is_first_process():  # once, and not by hundreds of tasks at the same time
        with launch.checked(settings.run_directory, settings.resume.max_requeues):
            _check(settings, dry_run)
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
    config: Annotated[Path, typer.Argument(help="YAML file; see examples/.", metavar="CONFIG")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="checkpoint=DIR: a checkpoint of a run or a Hugging Face one, instead of the config's model.",
            metavar="[checkpoint=DIR] [KEY=VALUE]...",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for every sample and the figures; runs/NAME/evaluation/CHECKPOINT if not given."),
    ] = None,
    seed: Seed = None,
) -> None:
    """Avg@k, Cons@k and Pass@k on the config's validation problems. The last line is one JSON object.

    Finished samples stay: the same command goes on where it was ended. More samples, problems or benchmarks are added
    to those that are there.
    """
    from megatron_fipo import launch
    from megatron_fipo.checks import check_evaluation
    from megatron_fipo.evaluation import command
    from megatron_fipo.evaluation.store import Store

    settings = with_seed(load_config(config, [_checkpoint_setting(text) for text in overrides or ()]), seed)
    if not settings.data.benchmarks:
        raise ValueError("data.validation must name the problem file to evaluate on")
    directory = out or command.default_directory(settings)

    def progress() -> launch.Progress:
        return launch.Progress(Store(directory).count(), "samples")

    if launch.is_first_process():
        with launch.checked(directory, settings.resume.max_requeues, progress):
            _warn(check_evaluation(settings))
            command.check(settings, directory)
    launch.run(
        command.run,
        settings.parallel,
        (settings, directory),
        run_directory=directory,
        max_requeues=settings.resume.max_requeues,
        progress=progress,
        deterministic=settings.run.deterministic,
        requirements=launch.requirements(settings, _benchmarks(settings)),
    )


def _benchmarks(config: Config) -> dict[str, str]:
    """Return the benchmarks' files by what messages call them."""
    return {f"data.validation {name}": file for name, file in config.data.benchmarks.items()}


def _checkpoint_setting(text: str) -> str:
    """`checkpoint=DIR` as the setting that it stands for; anything else as it is."""
    name, _, path = text.partition("=")
    if name != "checkpoint":
        return text
    if not Path(path).is_dir():
        raise ValueError(f"checkpoint={path} is no directory")
    return f"model.hf_path={path}" if any(Path(path).glob("*.safetensors")) else f"model.megatron_path={path}"


def _config_and_overrides(config: str | None, overrides: list[str], recipe: Path | None) -> tuple[Path, list[str]]:
    """Return the config file and the overrides: with a recipe, the first argument may be an override."""
    if recipe is not None and (config is None or "=" in config):
        return recipe, [config, *overrides] if config is not None else overrides
    if config is None:
        raise ValueError("train needs a config file; see examples/")
    return Path(config), overrides


def _check(config: Config, dry_run: bool) -> None:
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
    _warn(warnings)


def _obstacle_to_update(config: Config) -> str | None:
    """Return why this machine, a login node for example, cannot run one update of a configuration that is in order."""
    from megatron_fipo.fused_kernels import gpu_obstacle

    obstacle = gpu_obstacle() if config.model.transformer_engine == "on" else None
    return obstacle and f"model.transformer_engine=on needs a GPU and {obstacle}"


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        typer.secho(printable(f"warning: {warning}"), fg="yellow", err=True)


@data.command()
def prepare(
    input: Annotated[
        str, typer.Argument(help="dapo-math-17k, aime-2024 or aime-2025 from the Hugging Face hub, or a problem file.")
    ],
    output: Annotated[Path, typer.Argument(help="Where to write the checked, de-duplicated parquet file.")],
    validation_fraction: Annotated[float, typer.Option(help="Share of problems held out in a file beside it.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the held-out split.")] = 0,
) -> None:
    """Check a problem file, take every problem once, and hold some out.

    A problem file is parquet in the schema of DAPO-Math-17k, or parquet or JSON lines with a problem and an answer a
    row, which get DAPO's prompt.
    """
    from megatron_fipo.data import prepare as prepare_file

    done = prepare_file(input, output, validation_fraction, seed)
    typer.echo(
        f"{done.num_rows} rows, {done.num_unique} different prompts, "
        f"{done.num_contradictory} left out since their rows disagree on the answer"
    )
    for name, file in done.files.items():
        typer.echo(f"{output.parent / name}: {file.rows} problems, sha256 {file.sha256}")


@data.command("check")
def check_data(
    config: Annotated[Path, typer.Argument(help="YAML file; see examples/.", metavar="CONFIG")],
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(help="Number of prompts to show.")] = 3,
) -> None:
    """Show what the model will see of some prompts, where a response ends, and how the reward judges answers."""
    from megatron_fipo.data_check import show

    for line in show(load_config(config, overrides or []), prompts):
        typer.echo(printable(line))


_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
HFDirectory = Annotated[Path, typer.Option("--hf", help="Hugging Face checkpoint: config.json, *.safetensors.")]
MegatronDirectory = Annotated[Path, typer.Option("--megatron", help="Megatron distributed checkpoint (torch_dist).")]
OutDirectory = Annotated[Path, typer.Option("--out", help="Directory to make; it appears when it is complete.")]
WeightType = Annotated[
    str | None, typer.Option("--dtype", help=f"Of all weights: {', '.join(_DTYPES)}; as stored if not given.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted conversion stopped.")]


@convert.command("to-megatron")
def convert_to_megatron(hf: HFDirectory, out: OutDirectory, dtype: WeightType = None, resume: Resume = False) -> None:
    """Write a Megatron checkpoint that any layout can load; the layout is chosen when training starts."""
    from megatron_fipo.convert.conversion import to_megatron

    with _progress_bar(f"{hf} -> {out}") as progress:
        done = to_megatron(hf, out, _torch_dtype(dtype), resume, progress)
    _report_conversion(out, done)


@convert.command("to-hf")
def convert_to_huggingface(
    megatron: MegatronDirectory,
    out: OutDirectory,
    dtype: WeightType = None,
    resume: Resume = False,
    config: Annotated[
        Path | None, typer.Option(help="Directory of config.json and tokenizer, if not the checkpoint's own.")
    ] = None,
) -> None:
    """Write the model of a converted or a training checkpoint as safetensors that transformers loads."""
    from megatron_fipo.convert.conversion import to_huggingface

    with _progress_bar(f"{megatron} -> {out}") as progress:
        done = to_huggingface(megatron, out, _torch_dtype(dtype), resume, config, progress)
    _report_conversion(out, done)


@convert.command("verify")
def verify_conversion(
    hf: HFDirectory,
    megatron: MegatronDirectory,
    logits: Annotated[
        str | None, typer.Option(help="A prompt: compare its logits, too; both models must fit in memory.")
    ] = None,
) -> None:
    """Compare two checkpoints bit by bit. Exit code 1: they differ, and the output says where and by how much."""
    from megatron_fipo.convert.verify import verify

    with _progress_bar(f"{hf} = {megatron}") as progress:
        result = verify(hf, megatron, progress)
    _warn_of_nan(result.with_nan)
    for difference in result.differences:
        typer.echo(str(difference))
    same = not result.differences
    if logits is not None:
        from megatron_fipo.convert.logits import compare_logits

        found = compare_logits(hf, megatron, logits)
        typer.echo(str(found))
        same = same and found.is_rounding
    typer.echo("the checkpoints are the same model" if same else "the checkpoints differ")
    raise typer.Exit(0 if same else 1)


def _torch_dtype(name: str | None) -> Any:
    import torch

    if name is None:
        return None
    if name not in _DTYPES:
        raise ValueError(f"--dtype {name!r} is none of {', '.join(_DTYPES)}")
    return getattr(torch, _DTYPES[name])


@contextmanager
def _progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function that takes (bytes just done, bytes in all) and shows GB/s and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), disable=not sys.stderr.isatty(), console=Console(stderr=True)
    ) as bar:
        task = bar.add_task(description, total=None)
        yield lambda num_bytes, total: bar.update(task, advance=num_bytes, total=total)


def _report_conversion(out: Path, done: Any) -> None:
    _warn_of_nan(done.with_nan)
    typer.echo(f"{out}: {done.num_bytes / 1e9:.2f} GB of weights; names and shapes are those of its config")


def _warn_of_nan(names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        typer.secho(f"warning: there are NaNs in {', '.join(names[:5])}{more}", fg="yellow", err=True)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Runs' directories; several are drawn side by side.", metavar="RUN...")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The page; else <run>/report.html of one run, ./report.html of several.")
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(help="Runs whose names begin so are repeats, drawn as their mean; so are NAME-seed1, NAME-seed2."),
    ] = None,
) -> None:
    """Draw the figures of one run or of several, and a page that holds them."""
    _report(runs, out, group or ())


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
        Path | None, typer.Argument(help="YAML file: also judge whether `train` could start it.", metavar="[CONFIG]")
    ] = None,
    overrides: Overrides = None,
    login_node: Annotated[
        bool, typer.Option("--login-node", help="Judge the installation for jobs on GPU nodes: none is needed here.")
    ] = False,
) -> None:
    """Say what this machine has, what is missing, and what that costs.

    With CONFIG the last lines say whether the recipe is ready, what is missing, and what to run. Exit code 0: ready;
    1: not ready; 2: the file or a setting is wrong.
    """
    from megatron_fipo import doctor

    settings = None if config is None else load_config(config, overrides or [])
    doctor.diagnose()
    if settings is not None:
        raise typer.Exit(0 if doctor.judge(settings, str(config), login_node) else 1)


def _train_rank(config: Config) -> None:
    trainer = _trainer(config, resume=True)
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


def _trainer(config: Config, write: bool = True, resume: bool = False) -> Any:
    from megatron_fipo.trainer import Trainer

    return Trainer(config, write=write, resume=resume)


def _report(runs: Path | Sequence[Path], out: Path | None = None, groups: Sequence[str] = ()) -> None:
    from megatron_fipo.report.page import write_report

    typer.echo(write_report(runs, out, groups))


def main() -> None:
    """Entry point. A ValueError is the user's to mend; a failed rank shows its own traceback."""
    # Slurm's warning ahead of a job's end is for the ranks of a run; what comes before and after may end as it would.
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
