"""Made-up scaling studies: rows as `scaling run` writes them, their pipelines simulated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_fipo.scaling.pipeline.simulate import Communication, simulate
from megatron_fipo.scaling.pipeline.timeline import Timeline
from megatron_fipo.shapes.schedule import Schedule

TOKENS = 1_000_000


def make_row(
    gpus: int = 8, pipeline: int = 2, virtual_pipeline: int = 1, micro_batches: int = 8, **changes: Any
) -> dict[str, Any]:
    """A finished one: each GPU computes for 192 / `gpus` seconds, a third of it forward."""
    p, v, m = pipeline, virtual_pipeline, micro_batches
    replicas = gpus // p
    forward = 64 / gpus / (m * v)
    timeline = simulate(Schedule(p, m, v), forward, 2 * forward, Communication(0.02 * forward))
    seconds = timeline.step * 1.02
    layout = {"gpus": gpus, "tensor": 1, "pipeline": p, "virtual_pipeline": v, "context": 1, "expert": 1}
    layout |= {"data": replicas, "first_stage_layers": None, "last_stage_layers": None}
    row = {
        "name": f"small-g{gpus}-tp1-pp{p}-vpp{v}-m{m}-{changes.get('loss', 'fipo')}",
        "model": "small",
        "gpu": "H100-80",
        "loss": "fipo",
        **layout,
        "tokens_per_micro_batch": 4096,
        "recompute": "none",
        "micro_batches": m,
        "tokens": TOKENS,
        "status": "ok",
        "error": None,
        "step_seconds": [seconds * 1.01, seconds, seconds * 0.99],
        "seconds": seconds,
        "tokens_per_second": TOKENS / seconds,
        "tokens_per_second_per_gpu": TOKENS / seconds / gpus,
        "mfu": 0.4 * timeline.ideal / timeline.step,
        "bubble_fraction": timeline.bubble_fraction,
        "idle_over_ideal": timeline.idle_over_ideal,
        "stages": [_stage(timeline, stage) for stage in range(p)],
        "peak_memory_bytes": [(40 - stage) * 1e9 for stage in range(p)] * replicas,
        "memory_kind": "device",
        "predicted": {
            "seconds": seconds * 0.95,
            "bubble_fraction": timeline.bubble_fraction * 0.9,
            "memory_bytes": 42e9,
            "stage_memory_bytes": [(42 - 1.3 * stage) * 1e9 for stage in range(p)],
        },
        "closed_form_bubble_fraction": (p - 1) / (m * v + p - 1),
        "timeline": {"chunks": v, "stages": [[list(span) for span in spans] for spans in timeline.stages]},
        "environment": {"python": "3.11", "torch": "2.13.0", "hosts": ["n1", "n2"], "cuda": None},
    }
    return row | changes


def lost(row: dict[str, Any], status: str, error: str) -> dict[str, Any]:
    """The same layout, had it not come to its end."""
    measured = ("step_seconds", "seconds", "tokens_per_second", "tokens_per_second_per_gpu", "mfu", "bubble_fraction")
    nothing = dict.fromkeys((*measured, "idle_over_ideal", "stages", "timeline", "micro_batches", "tokens"))
    return {**row, **nothing, "status": status, "error": error, "peak_memory_bytes": [84.5e9, None]}


def write_study(directory: Path, *rows: dict[str, Any]) -> Path:
    (directory / "rows").mkdir(parents=True, exist_ok=True)
    for row in rows:
        (directory / "rows" / f"{row['name']}.json").write_text(json.dumps(row))
    return directory


def _stage(timeline: Timeline, stage: int) -> dict[str, Any]:
    bubble = timeline.bubbles()[stage]
    return {
        "stage": stage,
        "bubble_fraction": timeline.stage_bubble_fraction(stage),
        **vars(bubble),
        "busy": timeline.busy(stage),
        "peak_memory_bytes": (40 - stage) * 1e9,
    }
