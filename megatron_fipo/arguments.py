"""Arguments that several commands share; without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(help="YAML file; see examples/.", metavar="CONFIG")]

CheckpointOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="checkpoint=DIR: a checkpoint of a run or a Hugging Face one, instead of the config's model.",
        metavar="[checkpoint=DIR] [KEY=VALUE]...",
    ),
]
