"""`megatron-fipo scaling`: the commands of all sub-rooms."""

from __future__ import annotations

import typer

from megatron_fipo.exit_codes import EXIT_CODES
from megatron_fipo.scaling.calibrate.calibrate_command import calibrate
from megatron_fipo.scaling.measure import run_command
from megatron_fipo.scaling.measure.sweep_command import sweep
from megatron_fipo.scaling.planner.plan_command import plan

app = typer.Typer(help="Plan, measure and compare training layouts.", no_args_is_help=True)


@app.callback()
def scaling() -> None:
    """Plan, measure and compare training layouts."""


app.command(epilog=EXIT_CODES)(plan)
app.command(epilog=run_command.EPILOG)(run_command.run)
app.command(epilog=EXIT_CODES)(sweep)
app.command(epilog=EXIT_CODES)(calibrate)
