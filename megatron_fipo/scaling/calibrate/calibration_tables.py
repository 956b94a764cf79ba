"""Terminal tables of a calibration."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from megatron_fipo.scaling.calibrate.fit import Machine, Measurements, entries, fit_gemm


def matmul_table(measured: Measurements) -> Table:
    """Return measured and fitted rates of all matmuls."""
    gemm = fit_gemm(measured.matmuls)
    table = Table(title=f"matmuls in {measured.dtype}, TFLOP/s", box=SIMPLE_HEAD)
    for name in ("rows", "inner", "width", "measured", "fitted", "spread"):
        table.add_column(name, justify="right")
    for p in measured.matmuls:
        rates = (f"{rate / 1e12:.4g}" for rate in (p.rate, p.flops / gemm.seconds(p)))
        table.add_row(str(p.rows), str(p.inner), str(p.width), *rates, f"{p.timing.spread:.1%}")
    return table


def constants_table(machine: Machine, measured: Measurements) -> Table:
    """Return the constants of the calibration file."""
    table = Table(title="calibrated constants", box=SIMPLE_HEAD)
    for name in ("constant", "value", "measured from"):
        table.add_column(name, justify="right" if name == "value" else "left", overflow="fold")
    for path, value, source in entries(machine, measured):
        table.add_row(".".join(path[2:]), f"{value:.4g}" if isinstance(value, float) else str(value), source)
    return table
