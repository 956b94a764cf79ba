"""Calibration on one rank, one per GPU or CPU process; rank 0 writes and prints the result."""

from __future__ import annotations

import platform
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_fipo.atomic_file import write_atomically
from megatron_fipo.parallel.collectives import gather
from megatron_fipo.scaling.calibrate.calibration_tables import constants_table, matmul_table
from megatron_fipo.scaling.calibrate.fit import Machine, Measurements, noise, render
from megatron_fipo.scaling.calibrate.measurements import SHARES, Calibration
from megatron_fipo.scaling.calibrate.request import Request, known_gpu
from megatron_fipo.scaling.cost.hardware import name_of

_PROCESSES = 1024  # assumed size of a CPU machine's link group


def calibrate_rank(request: Request) -> None:
    """Calibrate on every rank; rank 0 writes and prints the calibration."""
    start = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    machine = _machine(request, device)
    with _progress() as show:
        measured = Calibration(request, device, show).measure()
    took = f"{time.monotonic() - start:.1f} s of at most {request.minutes * 60:.1f}"
    machine = replace(machine, notes={**machine.notes, "measured in": took})
    if dist.get_rank() == 0:
        _finish(request, machine, measured)


def _machine(request: Request, device: torch.device) -> Machine:
    hosts = Counter(gather(socket.gethostname()))
    if device.type == "cuda":
        called, memory = torch.cuda.get_device_name(), float(torch.cuda.mem_get_info()[1])
        found, group = name_of(called, memory), max(hosts.values())
    else:
        called, memory = _processor(), psutil.virtual_memory().total / max(hosts.values())
        found, group = None, _PROCESSES
    own = request.gpu or found or (re.sub(r"[^\w.-]+", "-", called).strip("-") if device.type == "cuda" else "cpu")
    name = known_gpu(own)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    notes = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "hosts": ", ".join(f"{host} ({ranks} ranks)" for host, ranks in hosts.items()),
        "device": f"{called}, {torch.get_num_threads()} threads per rank",
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items() if v),
    }
    return Machine(name or own, name is not None, memory, group, notes)


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1) if found else platform.processor() or platform.machine()


def _finish(request: Request, machine: Machine, measured: Measurements) -> None:
    write_atomically(request.out, render(machine, measured))
    console = Console(width=100, markup=False)
    for table in (matmul_table(measured), constants_table(machine, measured)):
        console.print(table)
    if (text := noise(measured)) is not None:
        console.print(f"warning: {text}", style="yellow", markup=False, highlight=False)
    console.print(
        f"calibration of {machine.name}, {machine.notes['measured in']}: {request.out}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the name of the measurement that starts."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=dist.get_rank() != 0, transient=True) as bar:
        task = bar.add_task("starting", total=len(SHARES) + 1)

        def show(what: str) -> None:
            bar.update(task, advance=1, description=what)

        yield show
