"""`megatron-fipo mismatch`: its arguments, without torch, which is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_fipo.arguments import CheckpointOverrides, ConfigFile
from megatron_fipo.config import checkpoint_setting, load_config
from megatron_fipo.mismatch.options import DEFAULT_TOKENS, Options
from megatron_fipo.printable import printable

if TYPE_CHECKING:
    from megatron_fipo.config import Config


def mismatch(
    config: ConfigFile,
    overrides: CheckpointOverrides = None,
    responses: Annotated[int, typer.Option(help="Number of responses, to the run's first prompts.", min=1)] = 4,
    tokens: Annotated[
        int | None,
        typer.Option(
            help=f"Longest response; {DEFAULT_TOKENS} if not given, or rollout.max_response_tokens if fewer.", min=1
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for all numbers as JSON.")] = None,
) -> None:
    """Report where trainer and rollout engine begin to differ, layer by layer.

    For runs whose mismatch/* metrics are large. Needs the ranks and the memory of `train`; trains nothing.
    """
    from megatron_fipo import launch

    settings = load_config(config, [checkpoint_setting(text) for text in overrides or ()])
    options = Options(responses, tokens, out)
    if launch.is_first_process():
        for warning in launch.in_own_process(_check, settings, options):
            typer.secho(printable(f"warning: {warning}"), fg="yellow", err=True)
    launch.run(
        _rank,
        settings.parallel,
        (settings, options),
        deterministic=settings.run.deterministic,
        requirements=launch.requirements(settings, {"data.train": settings.data.train}),
    )


def _check(config: Config, options: Options) -> list[str]:
    """Return warnings."""
    from megatron_fipo.mismatch import rank

    return rank.check(config, options)


def _rank(config: Config, options: Options) -> None:
    from megatron_fipo.mismatch import rank

    rank.run(config, options)
