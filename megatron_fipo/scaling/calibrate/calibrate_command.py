"""`megatron-fipo scaling calibrate`: measure this machine for the planner."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_fipo.config import ParallelConfig


def calibrate(
    out: Annotated[Path, typer.Option(help="Calibration file to write, for `scaling plan --calibration`.")] = Path(
        "calibration.yaml"
    ),
    gpu: Annotated[str | None, typer.Option(help="Name in the file; default: the device's name, or cpu.")] = None,
    minutes: Annotated[float, typer.Option(help="Time budget (minutes), without start-up.")] = 3.0,
    dtype: Annotated[
        str | None, typer.Option(help="Matmul dtype: bfloat16 (default on GPUs) or float32 (default on CPUs).")
    ] = None,
) -> None:
    """Measure this machine for `scaling plan`: matmuls, attention, memory, links, kernel launches.

    Starts one rank per GPU, or 2 on a CPU, unless torchrun or srun already did. A GPU that the planner knows keeps its
    data-sheet rates and gets measured efficiencies; any other machine becomes a GPU of its own in the file.
    """
    from megatron_fipo.scaling.calibrate.request import Request

    request = Request(out, gpu, minutes, dtype)
    request.check()
    from megatron_fipo import launch
    from megatron_fipo.scaling.calibrate.rank import calibrate_rank

    ranks = launch.started_ranks() or launch.num_gpus() or 2
    launch.run(calibrate_rank, ParallelConfig(world_size=ranks), (request,))
