"""What was measured of a machine becomes the planner's constants, and a calibration file that `plan` reads.

The fits invert `cost.py`'s own formulas. What was not measured is not in the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

import numpy as np

from megatron_fipo.scaling.bench import Timing
from megatron_fipo.scaling.hardware import hardware_files

NOISY = 0.1  # relative spread above which a measurement is warned of


class Product(NamedTuple):
    """A matrix product `[rows, inner] x [inner, width]`."""

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
    """Of something moved or computed: `amount` (bytes or FLOPs) by one operation, as `cost.py` counts it."""

    name: str
    size: str
    amount: float
    timing: Timing

    @property
    def value(self) -> float:
        return self.amount / self.timing.seconds


@dataclass(frozen=True)
class Machine:
    """What is calibrated.

    Attributes:
        name: of the GPU as `plan --gpu` takes it.
        known: it stands in `hardware.yaml`, whose printed rates stay.
        memory: bytes of one rank's device; `group`: ranks that reach each other by `link`.
        notes: name -> text, for the file's head.
    """

    name: str
    known: bool
    memory: float
    group: int
    notes: Mapping[str, str]


@dataclass
class Measurements:
    """Whatever came out; empty: not measured."""

    products: list[Product] = field(default_factory=list)
    attention: list[Rate] = field(default_factory=list)
    memory: list[Rate] = field(default_factory=list)
    link: list[Rate] = field(default_factory=list)
    network: list[Rate] = field(default_factory=list)
    layer: tuple[float, Timing] | None = None  # seconds of one layer, and the timing of the deeper model
    reserve_bytes: float | None = None
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Gemm:
    """`cost.py`'s model of a product: seconds = FLOPs / rate * (1 + half_width / width)."""

    rate: float
    half_width: float

    def seconds(self, product: Product) -> float:
        return product.flops / self.rate * (1 + self.half_width / product.width)


def fit_gemm(products: Sequence[Product]) -> Gemm:
    """Least squares of the relative errors.

    Raises:
        ValueError: no product was timed.
    """
    if not products:
        raise ValueError("no matrix product was timed")
    per_flop = np.array([p.timing.seconds / p.flops for p in products])
    columns = np.array([[1.0, 1.0 / p.width] for p in products]) / per_flop[:, None]
    flat, narrow = np.linalg.lstsq(columns, np.ones(len(products)), rcond=None)[0].tolist()
    if narrow <= 0 or flat <= 0:  # narrow ones were not slower, or nothing else counted: one rate for all
        flat, narrow = float((1 / per_flop).sum() / (1 / per_flop**2).sum()), 0.0
    return Gemm(1 / flat, narrow / flat)


class Entry(NamedTuple):
    """A number of the file, where it stands, and what it was measured from."""

    path: tuple[str, ...]
    value: float | str
    source: str


def entries(machine: Machine, m: Measurements) -> list[Entry]:
    """What the file says; of a known GPU its efficiencies, of another machine also what stands for printed rates."""
    printed = hardware_files()["gpus"].get(machine.name) if machine.known else None
    generation = printed["generation"] if printed else machine.name
    shares = ("efficiencies", generation)
    peaks = _Peaks(machine, printed)
    found: list[Entry] = []
    if m.products:
        gemm = fit_gemm(m.products)
        peak = peaks.of(("flops", "bfloat16"), max(gemm.rate, *(p.rate for p in m.products)), "the best product")
        source = f"{len(m.products)} products in {m.dtype}, {_samples([p.timing for p in m.products])}"
        found.append(Entry((*shares, "gemm", "bfloat16"), gemm.rate / peak, source))
        found.append(Entry((*shares, "gemm_width"), gemm.half_width, "the same products"))
        if m.attention:
            found.append(Entry((*shares, "attention"), _median(m.attention) / peak, _source(m.attention)))
    for name, place, rates in (
        ("memory", "memory_bandwidth", m.memory),
        ("link", "link", m.link),
        ("network", "network", m.network),
    ):
        if rates:
            peak = peaks.of((place,), max(r.value for r in rates), "the best one measured")
            found.append(Entry((*shares, name), _median(rates) / peak, _source(rates)))
    if m.layer is not None:
        seconds, timing = m.layer
        host = ", the host's time since its kernels wait for each other" if timing.waited else ""
        source = f"a layer of next to no arithmetic{host}, {_samples([timing])}"
        found.append(Entry((*shares, "layer_seconds"), seconds, source))
    if m.reserve_bytes is not None:
        found.append(Entry((*shares, "reserve_bytes"), m.reserve_bytes, "an idle rank"))
    return peaks.entries() + found


class _Peaks:
    """Printed rates, or the best measured ones where none are printed."""

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
        place = ("gpus", self.machine.name)
        head = [
            Entry((*place, "generation"), self.machine.name, ""),
            Entry((*place, "memory"), self.machine.memory, "of each rank"),
            Entry((*place, "link_gpus"), self.machine.group, "ranks that reach each other without a network card"),
        ]
        return head + self.found


def render(machine: Machine, m: Measurements) -> str:
    """The file."""
    head = ["# Written by `megatron-fipo scaling calibrate`; read by `megatron-fipo scaling plan --calibration`."]
    head += [f"# {name}: {text}" for name, text in machine.notes.items()]
    head += ["# Medians of repetitions, then of ranks. Spread: the repetitions' middle half over their median."]
    if m.products:
        gemm = fit_gemm(m.products)
        head += [f"# {m.dtype} products: rows x inner x width, TFLOP/s measured and fitted, spread"]
        head += [
            f"#   {p.rows} x {p.inner} x {p.width}: {p.rate / 1e12:.4g}, {p.flops / gemm.seconds(p) / 1e12:.4g}, "
            f"{p.timing.spread:.1%}"
            for p in m.products
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
    """A warning where repetitions differ too much to be believed."""
    timed = [(f"the product {p.rows} x {p.inner} x {p.width}", p.timing) for p in m.products]
    timed += [(f"{r.name}, {r.size}", r.timing) for r in (*m.attention, *m.memory, *m.link, *m.network)]
    timed += [("a layer", m.layer[1])] if m.layer is not None else []
    noisy = [t.spread for _, t in timed if t.spread > NOISY]
    if not noisy:
        return None
    name, worst = max(timed, key=lambda each: each[1].spread)
    return (
        f"{len(noisy)} of {len(timed)} measurements spread by more than {NOISY:.0%}, most of all {name}, by "
        f"{worst.spread:.0%}: calibrate on a machine that does nothing else"
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
