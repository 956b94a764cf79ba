"""Plans as terminal tables, and as CSV and JSON files that are written atomically."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megatron_fipo.atomic_file import write_atomically
from megatron_fipo.scaling.planner.planner import Candidate, Plan, ScalingRow

WIDTH = 100
_EXPLAINED = {
    "gemm": "matmuls",
    "attention": "attention",
    "elementwise": "norms, activations, casts",
    "head": "LM head and log-probabilities",
    "tensor": "tensor-parallel communication",
    "context": "context-parallel communication",
    "expert": "expert-parallel communication",
    "overhead": "kernel launches",
    "p2p": "messages between stages",
    "data": "data-parallel communication",
    "optimizer": "optimizer",
    "bubble": "bubble (idle)",
}


def plan_table(plan: Plan, title: str, rows: int) -> Table:
    """Table of the fastest layouts. layers: of first and last stage; micro: micro-batches."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    for column in ("#", "layout", "layers", "tokens", "recompute", "micro", "s", "tok/s/GPU", "MFU", "bubble", "GB"):
        left = column in ("layout", "layers", "recompute")
        table.add_column(column, justify="left" if left else "right", no_wrap=column == "layout")
    for number, c in enumerate(plan.candidates[:rows], start=1):
        table.add_row(
            str(number),
            str(c.layout),
            _stages(c),
            f"{c.layout.tokens_per_micro_batch:,}",
            c.layout.recompute,
            str(len(c.batch.sizes)),
            f"{c.cost.seconds:.2f}",
            f"{c.cost.tokens_per_second_per_gpu:,.0f}",
            f"{c.cost.mfu:.1%}",
            f"{c.cost.bubble_fraction:.1%}",
            f"{c.memory.total / 1e9:.1f}",
        )
    return table


def _stages(c: Candidate) -> str:
    p = c.layout.parallel
    if p.pipeline_layout is not None:
        return p.pipeline_layout
    if p.first_stage_layers is None and p.last_stage_layers is None:
        return "even"
    first = "-" if p.first_stage_layers is None else str(p.first_stage_layers)
    last = "-" if p.last_stage_layers is None else str(p.last_stage_layers)
    return f"{first}..{last}"


def explain_tables(c: Candidate) -> list[Table]:
    """Tables of one layout: seconds of each stage, and the memory of the fullest."""
    time = Table(title=f"{c.layout}: one update of {c.cost.seconds:.2f} s, {len(c.batch.sizes)} micro-batches")
    shown = _shown_stages(len(c.cost.stages))
    time.add_column("seconds per stage")
    for i in shown:
        time.add_column(str(i), justify="right")
    for part, name in _EXPLAINED.items():
        values = [c.cost.stages[i][part] for i in shown]
        if any(abs(v) > 5e-4 for v in values):
            time.add_row(name, *(f"{v:.3f}" for v in values))
    time.add_row("total", *(f"{sum(c.cost.stages[i].values()):.3f}" for i in shown))
    time.add_row("old log-probabilities of the same sequences", *([""] * (len(shown) - 1)), f"{c.log_prob_seconds:.3f}")
    memory = Table(title=f"memory of stage {c.stage} on a GPU with {c.gpu_memory / 1e9:.1f} GB")
    memory.add_column("peak memory")
    memory.add_column("GB", justify="right")
    for part in c.memory.__dataclass_fields__:
        memory.add_row(part, f"{getattr(c.memory, part) / 1e9:.2f}")
    memory.add_row("total", f"{c.memory.total / 1e9:.2f}")
    memory.add_row("free" if c.fits else "missing", f"{abs(c.spare) / 1e9:.2f}")
    return [time, memory]


def _shown_stages(count: int) -> list[int]:
    """Return at most five stages."""
    return list(range(count)) if count <= 5 else [0, 1, count // 2, count - 2, count - 1]


def scaling_table(rows: Sequence[ScalingRow], title: str) -> Table:
    """Table of the best layout at each number of GPUs."""
    table = Table(title=title)
    for column in ("GPUs", "layout", "s", "tok/s/GPU", "MFU", "bubble", "efficiency"):
        table.add_column(column, justify="left" if column == "layout" else "right", no_wrap=column == "layout")
    for row in rows:
        cost = row.best.cost
        table.add_row(
            f"{row.gpus:,}",
            str(row.best.layout) + (" recompute" if row.best.layout.recompute == "full" else ""),
            f"{cost.seconds:.2f}",
            f"{cost.tokens_per_second_per_gpu:,.0f}",
            f"{cost.mfu:.1%}",
            f"{cost.bubble_fraction:.1%}",
            f"{row.efficiency:.1%}",
        )
    return table


def show(tables: Sequence[Table]) -> None:
    """Print tables."""
    console = Console(width=WIDTH, markup=False)
    for table in tables:
        console.print(table)


def record(c: Candidate) -> dict[str, Any]:
    """Return a candidate as flat numbers."""
    return {
        **c.layout.record(),
        "micro_batches": len(c.batch.sizes),
        "seconds": c.cost.seconds,
        "log_prob_seconds": c.log_prob_seconds,
        "tokens_per_second_per_gpu": c.cost.tokens_per_second_per_gpu,
        "mfu": c.cost.mfu,
        "bubble_fraction": c.cost.bubble_fraction,
        "memory_gb": c.memory.total / 1e9,
        "free_gb": c.spare / 1e9,
        "fits": c.fits,
        "replayed": c.replayed,
    }


def write_csv(path: Path, candidates: Sequence[Candidate]) -> None:
    """Write candidates as CSV."""
    text = io.StringIO()
    rows = [record(c) for c in candidates]
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    _write(path, text.getvalue())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write content as JSON."""
    _write(path, json.dumps(content, indent=1) + "\n")


def details(c: Candidate) -> dict[str, Any]:
    """Return a candidate with its breakdown."""
    return {
        **record(c),
        "stages": [dict(stage) for stage in c.cost.stages],
        "memory": {name: getattr(c.memory, name) for name in c.memory.__dataclass_fields__},
        "memory_stage": c.stage,
    }


def _write(path: Path, text: str) -> None:
    """Write a file atomically.

    Raises:
        ValueError: the path cannot be written.
    """
    try:
        write_atomically(path, text)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error}") from None
