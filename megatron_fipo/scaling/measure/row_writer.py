"""Row of a measurement, written by the process that supervises the ranks, also after a failure."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_fipo.atomic_file import write_atomically
from megatron_fipo.machine.host import host
from megatron_fipo.scaling.cost.flops import model_flops
from megatron_fipo.scaling.cost.layout import Layout
from megatron_fipo.scaling.cost.memory import estimated_memory
from megatron_fipo.scaling.cost.model_shapes import ModelShape
from megatron_fipo.scaling.measure.rank import RESULT
from megatron_fipo.scaling.measure.specification import Measurement, model_name, read_row
from megatron_fipo.scaling.planner.legal_layouts import layout_problems
from megatron_fipo.scaling.planner.planner import Planner
from megatron_fipo.scaling.planner.run_inputs import engine_bytes, model_of
from megatron_fipo.shapes.micro_batches import plan_micro_batches

_REFUSED = "exit code 127"  # with which the C library ends a process that is refused memory for a thread's variables
_MEASURED = (
    *("step_seconds", "seconds", "tokens_per_second", "tokens_per_second_per_gpu", "mfu", "loss_value"),
    *("bubble_fraction", "idle_over_ideal", "pipeline_seconds", "stages", "timeline"),
    *("simulated_seconds", "simulated_bubble_fraction"),
)


def write_finished_row(measurement: Measurement) -> dict[str, Any]:
    """Write the row of a completed measurement."""
    result = json.loads((measurement.notes / RESULT).read_text())
    row = _base(measurement) | {"status": "ok", "error": None}
    tokens, p = measurement.sequences.tokens, measurement.config.parallel
    per_second = tokens / result["seconds"]
    hosts, gpu_name = result.pop("hosts"), result.pop("gpu_name")
    row |= result | {"tokens_per_second": per_second, "tokens_per_second_per_gpu": per_second / p.world_size}
    row["mfu"] = _mfu(measurement, result["seconds"])
    row["environment"] |= {"hosts": hosts, "gpu_name": gpu_name}
    return _write(measurement, row)


def write_failed_row(measurement: Measurement, error: str) -> dict[str, Any]:
    """Write the row of a failed measurement from the ranks' progress files.

    `error` is the supervisor's message; a rank's own out-of-memory error takes precedence.
    """
    ranks = measurement.config.parallel.world_size
    notes = [read_row(measurement.notes / f"rank_{rank}.json") or {} for rank in range(ranks)]
    full = min((n for n in notes if n.get("out_of_memory")), key=lambda note: note["at"], default=None)
    refused = full is not None or (measurement.memory_bytes is not None and _REFUSED in error)
    row = _base(measurement) | dict.fromkeys(_MEASURED)
    row |= {
        "status": "out_of_memory" if refused else "failed",
        "error": " ".join(str(full["error"] if full else error).splitlines()[:1])[:1000],
        "peak_memory_bytes": [note.get("peak_memory_bytes") for note in notes],
        "memory_kind": next((n["memory_kind"] for n in notes if n), _memory_kind()),
    }
    return _write(measurement, row)


def prepare_notes(measurement: Measurement) -> None:
    """Create an empty directory for the ranks' progress, and remove an earlier row."""
    shutil.rmtree(measurement.notes, ignore_errors=True)
    measurement.notes.mkdir(parents=True)
    measurement.row_path.unlink(missing_ok=True)


def _write(measurement: Measurement, row: dict[str, Any]) -> dict[str, Any]:
    measurement.row_path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(measurement.row_path, json.dumps(row) + "\n")
    shutil.rmtree(measurement.notes, ignore_errors=True)
    return row


def _base(measurement: Measurement) -> dict[str, Any]:
    """Return the fields that are known before the measurement."""
    config, p = measurement.config, measurement.config.parallel
    micro_batches = _micro_batches(measurement)
    return {
        "name": measurement.name,
        "model": model_name(config),
        "gpu": measurement.gpu,
        "loss": measurement.loss,
        **Layout.of(config).record(),
        "micro_batches": micro_batches,
        "tokens": measurement.sequences.tokens,
        "predicted": _predicted(measurement),
        "closed_form_bubble_fraction": micro_batches
        and (p.pipeline - 1) / (micro_batches * p.virtual_pipeline * p.sequence_chunks + p.pipeline - 1),
        "environment": _environment(),
    }


def _micro_batches(measurement: Measurement) -> int | None:
    """Return the micro-batches per replica; None if a sequence does not fit or the layout is illegal."""
    p = measurement.config.parallel
    try:
        plan = plan_micro_batches(
            measurement.sequences.lengths,
            replicas=max(1, p.data),
            token_budget=measurement.config.trainer.tokens_per_micro_batch,
            alignment=p.sequence_alignment,
            multiple=p.pipeline if p.virtual_pipeline > 1 else 1,
        )
    except ValueError:
        return None
    return len(plan[0])


def _predicted(measurement: Measurement) -> dict[str, Any] | None:
    """Return the planner's prediction; None without hardware data or for an illegal layout."""
    if measurement.hardware is None:
        return None
    config, layout = measurement.config, Layout.of(measurement.config)
    try:
        model = model_of(config)
        if layout_problems(model, config.parallel):
            return None
        planner = Planner(model, measurement.hardware, measurement.sequences, engine_bytes=engine_bytes(config))
        cost, tokens = planner.evaluate(layout).cost, planner.peak_tokens(layout)
    except ValueError:
        return None
    stages = estimated_memory(model, measurement.hardware, layout, tokens)
    return {
        "seconds": cost.seconds,
        "bubble_fraction": cost.bubble_fraction,
        "memory_bytes": max(stage.total for stage in stages),  # must fit into device memory
        "stage_memory_bytes": [stage.total - stage.reserve for stage in stages],  # tensors, as measured
    }


def _mfu(measurement: Measurement, seconds: float) -> float | None:
    if measurement.hardware is None:
        return None
    model: ModelShape = model_of(measurement.config)
    flops = model_flops(model, measurement.sequences.tokens, measurement.sequences.squares)
    peak = measurement.hardware.gpu.flops["bfloat16"]
    return flops / seconds / measurement.config.parallel.world_size / peak


def _memory_kind() -> str:
    return "device" if torch.cuda.is_available() else "host"


def _environment() -> dict[str, Any]:
    on_gpu = torch.version.cuda is not None and torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": _version("megatron-core"),
        "transformer-engine": _version("transformer-engine"),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "gpu_name": None,
        "hosts": [host()],
        "git commit": _commit(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "argv": shlex.join(sys.argv),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of this checkout; None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False, env=dict(os.environ))
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
