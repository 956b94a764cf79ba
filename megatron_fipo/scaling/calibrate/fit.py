"""Fit the planner's constants to measurements and write the calibration file that `plan` reads.

The fits invert the formulas in `cost.py`. Constants that were not measured are left out of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

import numpy as np

from megatron_fipo.scaling.calibrate.bench import Timing
from megatron_fipo.scaling.cost.hardware import hardware_files

NOISY = 0.1  # relative spread above which a measurement causes a warning


class Matmul(NamedTuple):
    """A matmul `[rows, inner] x [inner, width]` and its timing."""

    rows: int
    inner: int
    width: int
    timing: Timing

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inner * self.width

    @property
    def rate(self) -> float:
        return self.flops / self.timing.seconds


class Rate(NamedTuple):
    """Rate of one operation: `amount` is bytes or FLOPs, as `cost.py` counts them."""

    name: str
    size: str
    amount: float
    timing: Timing

    @property
    def value(self) -> float:
        return self.amount / self.timing.seconds


@dataclass(frozen=True)
class Machine:
    """The machine being calibrated.

    Attributes:
        name: GPU name for `plan --gpu`.
        known: listed in `hardware.yaml`, whose data-sheet rates are kept.
        memory: bytes of one rank's device.
        group: ranks that reach each other by `link`.
        notes: name -> text, for the file's header.
    """

    name: str
    known: bool
    memory: float
    group: int
    notes: Mapping[str, str]


@dataclass
class Measurements:
    """Results of all measurements; empty: not measured."""

    matmuls: list[Matmul] = field(default_factory=list)
    attention: list[Rate] = field(default_factory=list)
    memory: list[Rate] = field(default_factory=list)
    link: list[Rate] = field(default_factory=list)
    network: list[Rate] = field(default_factory=list)
    layer: tuple[float, Timing] | None = None  # seconds per layer, and the timing of the deeper model
    reserve_bytes: float | None = None
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Gemm:
    """Time model of a matmul in `cost.py`: seconds = FLOPs / rate * (1 + half_width / width)."""

    rate: float
    half_width: float

    def seconds(self, matmul: Matmul) -> float:
        return matmul.flops / self.rate * (1 + self.half_width / matmul.width)


def fit_gemm(matmuls: Sequence[Matmul]) -> Gemm:
    """Fit the matmul model by least squares on relative errors.

    Raises:
        ValueError: no matmul was timed.
    """
    if not matmuls:
        raise ValueError("no matmul was timed; increase --minutes")
    per_flop = np.array([p.timing.seconds / p.flops for p in matmuls])
    columns = np.array([[1.0, 1.0 / p.width] for p in matmuls]) / per_flop[:, None]
    flat, narrow = np.linalg.lstsq(columns, np.ones(len(matmuls)), rcond=None)[0].tolist()
    if narrow <= 0 or flat <= 0:  # narrow matmuls were not slower, or only width mattered: use a single rate
        flat, narrow = float((1 / per_flop).sum() / (1 / per_flop**2).sum()), 0.0
    return Gemm(1 / flat, narrow / flat)


class Entry(NamedTuple):
    """Entry of the calibration file: path, value and what it was measured from."""

    path: tuple[str, ...]
    value: float | str
    source: str


def entries(machine: Machine, m: Measurements) -> list[Entry]:
    """Return the file's entries: efficiencies, and for a GPU that is not in `hardware.yaml` its peak rates."""
    printed = hardware_files()["gpus"].get(machine.name) if machine.known else None
    generation = printed["generation"] if printed else machine.name
    shares = ("efficiencies", generation)
    peaks = _Peaks(machine, printed)
    found: list[Entry] = []
    if m.matmuls:
        gemm = fit_gemm(m.matmuls)
        peak = peaks.of(("flops", "bfloat16"), max(gemm.rate, *(p.rate for p in m.matmuls)), "the fastest matmul")
        source = f"{len(m.matmuls)} matmuls in {m.dtype}, {_samples([p.timing for p in m.matmuls])}"
        found.append(Entry((*shares, "gemm", "bfloat16"), gemm.rate / peak, source))
        found.append(Entry((*shares, "gemm_width"), gemm.half_width, "the same matmuls"))
        if m.attention:
            found.append(Entry((*shares, "attention"), _median(m.attention) / peak, _source(m.attention)))
    for name, data_sheet_field, rates in (
        ("memory", "memory_bandwidth", m.memory),
        ("link", "link", m.link),
        ("network", "network", m.network),
    ):
        if rates:
            peak = peaks.of((data_sheet_field,), max(r.value for r in rates), "the fastest measurement")
            found.append(Entry((*shares, name), _median(rates) / peak, _source(rates)))
    if m.layer is not None:
        seconds, timing = m.layer
        host = " (host-bound: its kernels wait for each other)" if timing.waited else ""
        source = f"a layer with negligible arithmetic{host}, {_samples([timing])}"
        found.append(Entry((*shares, "layer_seconds"), seconds, source))
    if m.reserve_bytes is not None:
        found.append(Entry((*shares, "reserve_bytes"), m.reserve_bytes, "an idle rank"))
    return peaks.entries() + found


class _Peaks:
    """Data-sheet rates, or the best measured ones for a GPU that is not in `hardware.yaml`."""

    def __init__(self, machine: Machine, printed: Mapping[str, object] | None) -> None:
        self.machine, self.printed = machine, printed
        self.found: list[Entry] = []

    def of(self, path: tuple[str, ...], best: float, source: str) -> float:
        if self.printed is not None:
            value: object = self.printed
            for name in path:
                assert isinstance(value, Mapping)
                value = value[name]
            assert isinstance(value, int | float)
            return float(value)
        self.found.append(Entry(("gpus", self.machine.name, *path), best, source))
        return best

    def entries(self) -> list[Entry]:
        if self.printed is not None:
            return []
        path = ("gpus", self.machine.name)
        head = [
            Entry((*path, "generation"), self.machine.name, ""),
            Entry((*path, "memory"), self.machine.memory, "per rank"),
            Entry((*path, "link_gpus"), self.machine.group, "ranks that reach each other without a network card"),
        ]
        return head + self.found


def render(machine: Machine, m: Measurements) -> str:
    """Return the content of the calibration file."""
    head = ["# Written by `megatron-fipo scaling calibrate`; read by `megatron-fipo scaling plan --calibration`."]
    head += [f"# {name}: {text}" for name, text in machine.notes.items()]
    head += ["# Medians of repetitions, then of ranks. Spread: interquartile range over median."]
    if m.matmuls:
        gemm = fit_gemm(m.matmuls)
        head += [f"# {m.dtype} matmuls: rows x inner x width, TFLOP/s measured and fitted, spread"]
        head += [
            f"#   {p.rows} x {p.inner} x {p.width}: {p.rate / 1e12:.4g}, {p.flops / gemm.seconds(p) / 1e12:.4g}, "
            f"{p.timing.spread:.1%}"
            for p in m.matmuls
        ]
    for r in (*m.attention, *m.memory, *m.link, *m.network):
        head.append(f"# {r.name}, {r.size}: {r.value / 1e9:.4g} G/s, spread {r.timing.spread:.1%}")
    lines: list[str] = []
    open_path: tuple[str, ...] = ()
    for entry in sorted(entries(machine, m), key=lambda e: e.path):
        for depth in range(len(entry.path) - 1):
            if open_path[: depth + 1] != entry.path[: depth + 1]:
                name = json.dumps(entry.path[1]) if depth == 1 else entry.path[depth]
                lines.append(f"{'  ' * depth}{name}:")
        open_path = entry.path[:-1]
        note = f"  # {entry.source}" if entry.source else ""
        lines.append(f"{'  ' * len(open_path)}{entry.path[-1]}: {_yaml(entry.value)}{note}")
    return "\n".join([*head, *lines]) + "\n"


def noise(m: Measurements) -> str | None:
    """Return a warning if repetitions differ too much, else None."""
    timed = [(f"matmul {p.rows} x {p.inner} x {p.width}", p.timing) for p in m.matmuls]
    timed += [(f"{r.name}, {r.size}", r.timing) for r in (*m.attention, *m.memory, *m.link, *m.network)]
    timed += [("a layer", m.layer[1])] if m.layer is not None else []
    noisy = [t.spread for _, t in timed if t.spread > NOISY]
    if not noisy:
        return None
    name, worst = max(timed, key=lambda each: each[1].spread)
    return (
        f"{len(noisy)} of {len(timed)} measurements have a spread above {NOISY:.0%}, the largest: "
        f"{name} with {worst.spread:.0%}; calibrate on an otherwise idle machine"
    )


def _yaml(value: float | str) -> str:
    return json.dumps(value) if isinstance(value, str) else str(value) if isinstance(value, int) else f"{value:.4e}"


def _median(rates: Sequence[Rate]) -> float:
    return median(r.value for r in rates)


def _source(rates: Sequence[Rate]) -> str:
    names = ", ".join(dict.fromkeys(r.name for r in rates))
    return f"{names}: {_samples([r.timing for r in rates])}"


def _samples(timings: Sequence[Timing]) -> str:
    count, spread = sum(t.samples for t in timings), max(t.spread for t in timings)
    return f"{count} repetitions, spread up to {spread:.1%}"
