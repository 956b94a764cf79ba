"""Rows of published runs, with the cost model's prediction and the measured step time.

A row is a line of a CSV with the columns of data/published_throughput.csv. Missing values are filled in
by rules for whole sources or models, never for single rows; each is documented here.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from megatron_fipo.config import ParallelConfig
from megatron_fipo.scaling.cost.flops import active_weights
from megatron_fipo.scaling.cost.hardware import Hardware, build_hardware, find_hardware
from megatron_fipo.scaling.cost.layout import Layout
from megatron_fipo.scaling.cost.model_shapes import ModelShape
from megatron_fipo.scaling.cost.step_cost import CostModel, Schedule, StepCost
from megatron_fipo.scaling.cost.workload import Batch, equal_batch
from megatron_fipo.scaling.pipeline.pipeline_time import pipeline_time
from published_names import OTHER_MODELS, Fields, Unusable, gpu_of, model_of, name_of, precision_of

THROUGHPUT = Path(__file__).parent / "data" / "published_throughput.csv"


@dataclass(frozen=True)
class Row:
    """One published run.

    Attributes:
        source: without the commit, so that releases of one table are grouped.
        software: a name in efficiency.yaml.
        release: of the software, YY.MM.
        seconds: measured per update.
        schedule: 1F1B, or another with a closed-form bubble in the literature.
    """

    fields: Fields
    source: str
    sweep: str
    model: ModelShape
    gpu: str
    precision: str
    software: str
    release: str
    attention: str
    fused_norms: bool
    adapters: bool
    layout: Layout
    batch: Batch
    schedule: str
    seconds: float

    @property
    def moe(self) -> bool:
        return self.model.experts is not None


# Sources that count only query-key pairs left by a causal mask; the others count all
CAUSAL_CONVENTION = r"Megatron-Bridge|Megatron-LM/pull"


@cache
def _printed_chunks() -> dict[tuple[str, ...], str]:
    """Return interleaving by repository, model and layout, where a table prints it."""
    with THROUGHPUT.open(newline="") as file:
        return {_recipe(f): f["vpp"] for f in csv.DictReader(file) if f["vpp"] not in ("", "1")}


def _recipe(f: Fields) -> tuple[str, ...]:
    repository = f["source"].split("@")[0].split(":")[0]
    return repository, name_of(f) or f["model"], f["layers"], f["gpu"], f["tp"], f["pp"], f["cp"] or "1"


def read_rows(path: Path) -> tuple[list[Row], list[tuple[Fields, str]]]:
    """Return usable rows, and the others with the reason."""
    rows, left_out = [], []
    with THROUGHPUT.open(newline="") as file:
        blank = dict.fromkeys(next(csv.reader(file)), "")  # another file may lack columns
    with path.open(newline="") as file:
        for fields in csv.DictReader(file):
            fields = {k: (v or "").strip() for k, v in {**blank, **fields}.items() if k is not None}
            try:
                rows.append(parse(fields))
            except (Unusable, KeyError, ValueError) as reason:
                left_out.append((fields, str(reason)))
    return rows, left_out


def parse(f: Fields) -> Row:
    """Parse a row; raise Unusable."""
    notes = f["notes"]
    if "WARNING" in notes:
        raise Unusable("WARNING in notes")
    if "WHOLE RL step" in notes or "whole step" in notes:
        raise Unusable("time of a whole RL step")
    if re.search(OTHER_MODELS, f["model"].lower()):
        raise Unusable("model that the planner cannot describe, or one without a size")
    if not all(f[x] for x in ("num_gpus", "tp", "pp")) or not f["gpu"]:
        raise Unusable("no layout")
    # Releases of a recipe omit what an earlier one printed.
    f = {**f, "vpp": f["vpp"] or _printed_chunks().get(_recipe(f), "")}
    model, parallel = model_of(f), _parallel(f)
    length = int(
        float(f["seq_len"] or 4096)
    )  # fine-tuning rows of dgxc-benchmarking: packed to 4,096 (tokens/s x step)
    micro_batch = int(float(f["micro_batch"] or 1))
    if not f["global_batch"] and (parallel.pipeline > 1 or not f["tokens_per_s_per_gpu"]):
        raise Unusable("no batch size")
    sequences = int(float(f["global_batch"])) if f["global_batch"] else micro_batch * parallel.data
    if sequences % (micro_batch * parallel.data) and sequences % parallel.data == 0:
        micro_batch = 1
    try:
        batch = equal_batch(length, sequences, micro_batch, parallel.data)
        layout = _layout(f, model, parallel, length * micro_batch)
    except ValueError as error:
        raise Unusable(f"layout: {error}") from None
    software, attention, fused_norms = _software(f)
    precision = precision_of(f["precision"].lower())
    gpu = gpu_of(f["gpu"])
    if precision not in find_hardware(gpu).gpu.flops:
        raise Unusable(f"{precision} on {gpu}")
    source = re.sub(r"@[^:]*", "", f["source"])
    return Row(
        fields=f,
        source=source,
        sweep="|".join([f["source"], re.sub(r"\d\d\.\d\d", "", f["model"]), gpu, f["precision"], f["seq_len"]]),
        model=model,
        gpu=gpu,
        precision=precision,
        software=software,
        release=_release(f),
        attention=attention,
        fused_norms=fused_norms,
        adapters="LORA" in f["model"] or re.search("LoRA (packed|Performance)", notes) is not None,
        layout=layout,
        batch=batch,
        schedule=_note(notes, "schedule") or "1F1B",
        seconds=_seconds(f, model, batch, precision),
    )


def _release(f: Fields) -> str:
    """Return the release in the column, or else as its notes or source name it."""
    if not f.get("release"):
        return release_of(f)
    if found := re.match(r"\d\d\.\d\d(\.\d\d)?", f["release"]):
        return found[0]
    raise Unusable("release that is not a year and month")


def release_of(f: Fields) -> str:
    """Return the release of the software, YY.MM: of its container or benchmark, or the month of its paper, or ""."""
    for text, pattern in (
        (f["notes"], r"\b(\d\d\.\d\d(?:\.\d\d)?)(?:\.rc\d+)? NeMo Container"),
        (f["notes"], r"^NeMo (\d\d\.\d\d)"),
        (f["notes"], r"dgxc-benchmarking (\d\d\.\d\d)"),
        (f["source"], r"arxiv\.org/abs/(\d\d)(\d\d)\."),
    ):
        if found := re.search(pattern, text):
            return ".".join(found.groups())
    return ""


def _note(notes: str, key: str) -> str:
    found = re.search(rf"\b{key}=([^;]*)", notes)
    return found[1].strip() if found else ""


def _parallel(f: Fields) -> ParallelConfig:
    size = {k: int(float(f[k] or 1)) for k in ("num_gpus", "tp", "pp", "cp", "ep", "vpp")}
    if size["num_gpus"] % (size["tp"] * size["pp"] * size["cp"]):
        raise Unusable("ranks not divisible by the layout")
    sequence = {"true": True, "false": False}.get(f["sequence_parallel"].lower(), _stack(f) == "nemo")
    return ParallelConfig(
        world_size=size["num_gpus"],
        tensor=size["tp"],
        pipeline=size["pp"],
        virtual_pipeline=size["vpp"] if size["pp"] > 1 else 1,
        context=size["cp"],
        expert=size["ep"],
        sequence=sequence and size["tp"] > 1,
    )


def _layout(f: Fields, model: ModelShape, p: ParallelConfig, tokens: int) -> Layout:
    """Return layers split evenly if possible; embedding and LM head count as a layer each if that makes them even."""
    layers, virtual = model.num_layers, p.virtual_pipeline
    if p.pipeline > 1 and not f["vpp"] and "interleav" in f["notes"]:
        each = (layers + (0 if layers % p.pipeline == 0 else 2)) // p.pipeline
        virtual = max(v for v in range(1, 7) if each % v == 0)
        p = replace(p, virtual_pipeline=virtual)
    if layers < p.pipeline * virtual:
        p, virtual = replace(p, virtual_pipeline=1), 1
    chunks = p.pipeline * virtual
    method = _note(f["notes"], "method").lower()
    if model.dense_layers and chunks > 1:
        counts = _full_chunks_first(layers, chunks)
    elif (layers + 2) % chunks == 0:
        each = (layers + 2) // chunks
        counts = [each - 1, *[each] * (chunks - 2), each - 1] if chunks > 1 else [layers]
    else:
        counts = [layers // chunks + (chunks - layers % chunks <= i) for i in range(chunks)]
    if method == "redis":
        counts = _redistributed(model, chunks)
    split = method.startswith(("vocab", "interlaced"))
    recompute: Any = f["recompute"] if f["recompute"] in ("full", "selective") else "none"
    coarse = model.experts is not None and model.experts.count <= 16 and "etp1" not in f["model"]
    return Layout(p, tokens, recompute, tuple(counts), p.tensor if coarse else 1, split)


def _full_chunks_first(layers: int, chunks: int) -> list[int]:
    """Return the split of Megatron-Bridge's recipes of DeepSeek-V3 and Kimi K2: few layers beside the head."""
    each = -(-layers // chunks)
    last = layers - each * (chunks - 1)
    return [each + min(0, last), *[each] * (chunks - 2), max(0, last)]


def _redistributed(model: ModelShape, stages: int) -> list[int]:
    """Move layers from the last stage until it is no slower than the others, weighing the head by its weights."""
    head = (
        model.hidden_size
        * model.vocab_size
        / ((active_weights(model) - model.hidden_size * model.vocab_size) / model.num_layers)
    )
    counts = [model.num_layers // stages + (i < model.num_layers % stages) for i in range(stages)]
    while counts[-1] > 0 and counts[-1] + head > min(counts[:-1]) + 1:
        counts[-1] -= 1
        counts[counts.index(min(counts[:-1]))] += 1
    return counts


def _stack(f: Fields) -> str:
    if re.search(r"dgxc-benchmarking|NVIDIA/NeMo|NVIDIA-NeMo|Megatron-LM(/pull|@d98e8a64dd:images)", f["source"]):
        return "nemo"
    if "Aleph-Alpha" in f["source"]:
        return "aleph_alpha"
    if f["notes"].startswith("MegaScale"):
        return "nemo"
    return "megatron"


def _software(f: Fields) -> tuple[str, str, bool]:
    """Return the software, its attention, and whether its norms are fused."""
    kernel, stack = _note(f["notes"], "kernel"), _stack(f)
    if not kernel:
        old = re.search(r"2104\.04473|2205\.05198", f["source"])
        return stack, "fused" if old else "flash", True
    attention = {"torch": "unfused", "fused": "fused"}.get(kernel, "flash1" if "v1" in kernel else "flash")
    return stack, attention, "RMS" in kernel


def _seconds(f: Fields, model: ModelShape, batch: Batch, precision: str) -> float:
    """Return the step time, or derive it from tokens/s, TFLOP/s or MFU, in this order, since conventions differ."""
    gpus, tokens = float(f["num_gpus"]), batch.all_tokens
    if f["step_time_s"]:
        return float(f["step_time_s"])
    if f["tokens_per_s_per_gpu"]:
        return tokens / float(f["tokens_per_s_per_gpu"]) / gpus
    counted = 6 * active_weights(model) * tokens
    attention = 12 * model.num_layers * model.num_heads * model.head_dim * batch.all_squares
    counted += attention / 2 if re.search(CAUSAL_CONVENTION, f["source"]) else attention
    hardware = re.search(r"achieved_hw_tflops=([\d.]+)", f["notes"])
    if hardware:  # arXiv 2104.04473 counts the recomputed forward pass
        head = 6 * model.hidden_size * model.vocab_size * tokens
        return ((counted - head) * 4 / 3 + head) / (float(hardware[1]) * 1e12) / gpus
    if f["model_tflops_per_gpu"]:
        return counted / (float(f["model_tflops_per_gpu"]) * 1e12) / gpus
    if f["mfu"]:
        peak = {"A100-80": 312e12, "H100-80": 989e12}.get(f["gpu"], 312e12)
        return counted / (float(f["mfu"]) * peak) / gpus
    raise Unusable("nothing measured")


def fitted_sources(rows: list[Row]) -> list[str]:
    """Return every other source by name, among those mostly of one GPU generation, dense or not; no pull requests."""
    strata: dict[tuple[str, bool], list[str]] = {}
    for source in sorted({row.source for row in rows if "/pull/" not in row.source}):
        kinds = [(find_hardware(row.gpu).gpu.generation, row.moe) for row in rows if row.source == source]
        strata.setdefault(max(set(kinds), key=lambda kind: (kinds.count(kind), kind)), []).append(source)
    return sorted(source for sources in strata.values() for source in sources[::2])


def hardware_of(row: Row, known: dict[str, Any]) -> Hardware:
    """Return the hardware with the row's kind of attention and norms."""
    found = build_hardware(known, row.gpu, row.software, row.release)
    software = replace(found.software, attention=row.attention, fused_norms=row.fused_norms)
    return replace(found, software=software)


def predict(row: Row, known: dict[str, Any], schedule: Schedule | None = None) -> StepCost:
    """Predict with the planner's cost model; `known`: contents of the hardware and efficiency files."""
    model = CostModel(row.model, hardware_of(row, known), row.precision, not row.adapters)
    return model.step(row.layout, row.batch, schedule or schedule_of(row))


def schedule_of(row: Row) -> Schedule:
    """Return 1F1B or a zero-bubble schedule (arXiv 2401.10241), in which half of backward (weights) can be delayed."""
    if not row.schedule.startswith("ZB"):
        return pipeline_time
    kept = 0.0 if row.schedule.startswith("ZB-2p") else 1.0

    def zero_bubble(
        forward: Sequence[float],
        backward: Sequence[float],
        micro_batches: int | Sequence[float],
        virtual: int,
        p2p: float,
        sequence_chunks: int,
    ) -> float:
        assert isinstance(micro_batches, int)
        assert sequence_chunks == 1
        slowest = max(f + b for f, b in zip(forward, backward, strict=True))
        return micro_batches * slowest + sum(kept * f + p2p for f in forward[1:])

    return zero_bubble


def sweeps(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Yield rows of one table with the same model, GPU, precision and sequence length, if five or more."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.sweep, []).append(row)
    yield from (g for g in groups.values() if len(g) >= 5)
