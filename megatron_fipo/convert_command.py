"""`megatron-fipo convert`: its arguments and output, without torch, which the convert room imports."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="Hugging Face checkpoints to Megatron and back.", no_args_is_help=True)
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
HFDirectory = Annotated[Path, typer.Option("--hf", help="Hugging Face checkpoint: config.json, *.safetensors.")]
MegatronDirectory = Annotated[Path, typer.Option("--megatron", help="Megatron distributed checkpoint (torch_dist).")]
OutDirectory = Annotated[Path, typer.Option("--out", help="Directory to create; it appears when it is complete.")]
WeightType = Annotated[
    str | None, typer.Option("--dtype", help=f"dtype of all weights: {', '.join(_DTYPES)}; default: as stored.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Resume an interrupted conversion.")]


@app.command("to-megatron")
def convert_to_megatron(hf: HFDirectory, out: OutDirectory, dtype: WeightType = None, resume: Resume = False) -> None:
    """Write a Megatron checkpoint, which any layout can load."""
    from megatron_fipo.convert.conversion import to_megatron

    with _progress_bar(f"{hf} -> {out}") as progress:
        done = to_megatron(hf, out, _torch_dtype(dtype), resume, progress)
    _report_conversion(out, done)


@app.command("to-hf")
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


@app.command("verify")
def verify_conversion(
    hf: HFDirectory,
    megatron: MegatronDirectory,
    logits: Annotated[
        str | None, typer.Option(help="Also compare the logits of this prompt; both models must fit in memory.")
    ] = None,
) -> None:
    """Compare two checkpoints bit by bit. Exit code 1: they differ; the output says where and by how much."""
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
        raise ValueError(f"--dtype {name!r} must be one of {', '.join(_DTYPES)}")
    return getattr(torch, _DTYPES[name])


@contextmanager
def _progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (bytes since the last call, total bytes) that shows GB/s and the time left."""
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
