"""Fit of the constants in megatron_fipo/scaling/cost/efficiency.yaml, shared by all rows of a GPU generation or code.

Coordinate search in the logarithm of each constant, always from the same start, on a robust loss of the logarithm
of predicted over measured step time. Rows of one source share a weight that grows with the square root of their
number, so that no long table dominates; a weak prior keeps unmeasured constants near the start.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from published_rows import Row, predict, schedule_of

Path = tuple[str, ...]
_ROWS_A_SWEEP = 10
_LINEAR_ABOVE = 0.03  # the loss is quadratic below this error
_PRIOR = 0.15
_GENERATION = ("gemm_width", "attention", "memory", "link", "network", "layer_seconds")
_EXPERTS = ("expert_width", "expert_seconds")
_SOFTWARE = {
    "nemo": ("tensor_exposed", "context_exposed", "expert_exposed", "data_overlap", "step_seconds", "straggling"),
    "aleph_alpha": ("node_network", "tensor_exposed", "step_seconds"),
    "megatron": ("tensor_exposed",),
}
_STARTS = {  # start values and centre of the prior, independent of previous fits
    "bfloat16": 0.7,
    "float8": 0.6,
    "float4": 0.5,
    "gemm_width": 60.0,
    "attention": 0.5,
    "memory": 0.8,
    "link": 0.7,
    "network": 0.8,
    "layer_seconds": 5e-5,
    "casts": 3.0,
    "expert_width": 1000.0,
    "expert_seconds": 1e-3,
    "tensor_exposed": {"nemo": 0.4, "aleph_alpha": 1.0, "megatron": 1.0},
    "context_exposed": 0.2,
    "expert_exposed": 0.7,
    "data_overlap": 0.8,
    "step_seconds": {"nemo": 0.02, "aleph_alpha": 0.05},
    "straggling": 0.003,
    "node_network": 15e9,
}
_LIMITS = {  # physical limits
    "gemm": (0.2, 0.95),
    "attention": (0.1, 0.9),
    "memory": (0.5, 0.95),
    "link": (0.3, 0.95),
    "network": (0.2, 1.0),
    "casts": (0.5, 12.0),
    "tensor_exposed": (0.02, 1.0),
    "context_exposed": (0.02, 1.0),
    "expert_exposed": (0.05, 1.5),
    "data_overlap": (0.05, 1.0),
    "straggling": (1e-4, 0.02),
}


@dataclass
class _Constant:
    path: Path
    rows: np.ndarray  # rows that it affects
    start: float
    step: float

    def limited(self, value: float) -> float:
        low, high = _LIMITS.get("gemm" if "gemm" in self.path else self.path[-1], (0.0, math.inf))
        return min(max(value, low), high)

    def prior(self, value: float) -> float:
        return _PRIOR * math.log(value / self.start) ** 2


def fit(rows: Sequence[Row], known: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Fit the constants of `known` in place and return it."""
    rows = _thinned(rows)
    counts = Counter(row.source for row in rows)
    weight = np.array([(0.5 if row.moe else 1.0) / math.sqrt(counts[row.source]) for row in rows])
    constants, bubbles = list(_constants(rows, known)), _Bubbles(rows)
    for number in range(rounds):
        bubbles.known.clear()  # they hardly depend on the constants: computed once per round
        error = bubbles.errors(range(len(rows)), known)
        for constant in constants:
            _improve(constant, known, bubbles, error, weight)
        print(f"round {number + 1}: loss {float((weight * _loss(error)).sum()):.4f}", flush=True)
    return known


def _improve(c: _Constant, known: dict[str, Any], bubbles: _Bubbles, error: np.ndarray, weight: np.ndarray) -> None:
    """Step up or down if that reduces the loss."""
    before = _get(known, c.path)
    best = float((weight[c.rows] * _loss(error[c.rows])).sum()) + c.prior(before)
    for direction in (1, -1):
        value = c.limited(before * math.exp(direction * c.step))
        _put(known, c.path, value)
        tried = bubbles.errors(c.rows, known)
        if float((weight[c.rows] * _loss(tried)).sum()) + c.prior(value) < best:
            error[c.rows] = tried
            c.step *= 1.3
            return
    _put(known, c.path, before)
    c.step *= 0.5


class _Bubbles:
    """Errors of rows, with cached ratios of pipeline time to busiest stage time."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.known: dict[int, float] = {}

    def errors(self, indices: Sequence[int] | np.ndarray, known: dict[str, Any]) -> np.ndarray:
        return np.array([self._error(int(i), known) for i in indices])

    def _error(self, i: int, known: dict[str, Any]) -> float:
        def remembered(
            forward: Sequence[float], backward: Sequence[float], count: int | Sequence[float], virtual: int, p2p: float
        ) -> float:
            stages = len(forward) // virtual
            busiest = max(sum(forward[k::stages]) + sum(backward[k::stages]) for k in range(stages))
            if i not in self.known:
                self.known[i] = schedule_of(row)(forward, backward, count, virtual, p2p) / busiest
            return self.known[i] * busiest

        row = self.rows[i]
        return math.log(predict(row, known, remembered).seconds / row.seconds)


def _constants(rows: Sequence[Row], known: dict[str, Any]) -> list[_Constant]:
    generation = [known["gpus"][row.gpu]["generation"] for row in rows]
    found = []

    def add(path: Path, uses: Sequence[bool], step: float) -> None:
        if any(uses):
            start: Any = _STARTS[path[-1]]
            start = start[path[1]] if isinstance(start, dict) else start
            _put(known, path, start)
            found.append(_Constant(path, np.flatnonzero(uses), start, step))

    for name, efficiency in known["efficiencies"].items():
        own_rows = [g == name for g in generation]
        for precision in efficiency["gemm"]:  # heads and unfused attention use bfloat16 in every run
            uses = [m and precision in ("bfloat16", row.precision) for m, row in zip(own_rows, rows, strict=True)]
            add(("efficiencies", name, "gemm", precision), uses, 0.05)
        for field in (*_GENERATION, *(("casts",) if len(efficiency["gemm"]) > 1 else ())):
            add(("efficiencies", name, field), own_rows, 0.1)
        for field in _EXPERTS:
            add(("efficiencies", name, field), [m and row.moe for m, row in zip(own_rows, rows, strict=True)], 0.1)
    for name, fields in _SOFTWARE.items():
        for field in fields:
            add(("software", name, field), [row.software == name for row in rows], 0.2)
    return found


def _thinned(rows: Sequence[Row]) -> list[Row]:
    sweeps: dict[str, list[Row]] = {}
    for row in rows:
        sweeps.setdefault(row.sweep, []).append(row)
    return [row for sweep in sweeps.values() for row in sweep[:: -(-len(sweep) // _ROWS_A_SWEEP)]]


def _loss(error: np.ndarray) -> np.ndarray:
    return np.sqrt(error * error + _LINEAR_ABOVE**2) - _LINEAR_ABOVE


def _get(known: dict[str, Any], path: Path) -> float:
    for key in path[:-1]:
        known = known[key]
    return float(known[path[-1]])


def _put(known: dict[str, Any], path: Path, value: float) -> None:
    for key in path[:-1]:
        known = known[key]
    known[path[-1]] = value
