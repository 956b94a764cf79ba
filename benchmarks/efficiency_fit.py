"""Fit of the constants in megatron_fipo/scaling/cost/efficiency.yaml, shared by all rows of a GPU generation or code.

Constants that dense rows use are fitted on dense rows; then those of experts alone, on rows of mixtures. Coordinate
search in the logarithm of each constant, always from the same start, on a robust loss of the logarithm of predicted
over measured step time. Rows of one source share a weight that grows with the square root of their number, so that no
long table dominates; the loss of mixtures saturates, so that unexplained runs do not; a weak prior keeps unmeasured
constants near the start.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_fipo.scaling.cost.hardware import generation_of
from published_rows import Row, predict, schedule_of

Path = tuple[str, ...]
_Loss = Callable[[np.ndarray, np.ndarray], float]  # of rows, by their indices and errors
_ROWS_A_SWEEP = 10
_LINEAR_ABOVE = 0.03  # the loss is quadratic below this error
_SATURATES_ABOVE = 0.15  # of mixtures: some releases ran at half speed, for reasons that no row states
_GENERATION = ("gemm_width", "attention", "memory", "link", "network", "layer_seconds")
_PRIOR, _EXPERTS_PRIOR = 0.15, 0.03  # weaker for experts: their rows are of few sources, whose weights are small
_SOFTWARE = {
    "nemo": ("tensor_exposed", "context_exposed", "data_overlap", "step_seconds", "straggling"),
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
    "expert_tokens": 500.0,
    "seconds": 1e-3,
    "passes": 6.0,
    "exposed": 0.8,
    "generations": 1.0,  # a factor of each
    "tensor_exposed": {"nemo": 0.4, "aleph_alpha": 1.0, "megatron": 1.0},
    "context_exposed": 0.2,
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
    "passes": (2.0, 60.0),
    "exposed": (0.05, 1.0),
    "generations": (0.05, 10.0),
    "data_overlap": (0.05, 1.0),
    "straggling": (1e-4, 0.02),
}


@dataclass
class _Constant:
    path: Path
    rows: np.ndarray  # rows that it affects
    start: float
    step: float
    weight: float  # of the prior

    def limited(self, value: float) -> float:
        low, high = _LIMITS.get(_field(self.path), (0.0, math.inf))
        return min(max(value, low), high)

    def prior(self, value: float) -> float:
        return self.weight * math.log(value / self.start) ** 2


def fit(rows: Sequence[Row], known: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Fit the constants of `known` in place and return it: of dense layers on dense rows, then of experts on others."""
    for moe in (False, True):
        _fit(_thinned([row for row in rows if row.moe == moe]), known, rounds, moe)
    return known


def _fit(rows: Sequence[Row], known: dict[str, Any], rounds: int, moe: bool) -> None:
    counts = Counter(row.source for row in rows)
    weight = np.array([1 / math.sqrt(counts[row.source]) for row in rows])
    constants = list((_expert_constants if moe else _constants)(rows, known))
    bubbles, loss = _Bubbles(rows), _saturating_loss if moe else _loss
    for number in range(rounds):
        bubbles.known.clear()  # they hardly depend on the constants: computed once per round
        error = bubbles.errors(range(len(rows)), known)
        for constant in constants:
            _improve(constant, known, bubbles, error, lambda rows, error: float((weight[rows] * loss(error)).sum()))
        print(f"round {number + 1}: loss {float((weight * loss(error)).sum()):.4f}", flush=True)


def _improve(c: _Constant, known: dict[str, Any], bubbles: _Bubbles, error: np.ndarray, loss: _Loss) -> None:
    """Step up or down if that reduces the loss."""
    before = _get(known, c.path)
    best = loss(c.rows, error[c.rows]) + c.prior(before)
    for direction in (1, -1):
        value = c.limited(before * math.exp(direction * c.step))
        _put(known, c.path, value)
        tried = bubbles.errors(c.rows, known)
        if loss(c.rows, tried) + c.prior(value) < best:
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


def _constants(rows: Sequence[Row], known: dict[str, Any]) -> Iterator[_Constant]:
    generation = [known["gpus"][row.gpu]["generation"] for row in rows]
    for name, efficiency in known["efficiencies"].items():
        own_rows = [g == name for g in generation]
        for precision in efficiency["gemm"]:  # heads and unfused attention use bfloat16 in every run
            uses = [m and precision in ("bfloat16", row.precision) for m, row in zip(own_rows, rows, strict=True)]
            yield from _started(known, ("efficiencies", name, "gemm", precision), uses, 0.05)
        for field in (*_GENERATION, *(("casts",) if len(efficiency["gemm"]) > 1 else ())):
            yield from _started(known, ("efficiencies", name, field), own_rows, 0.1)
    for name, fields in _SOFTWARE.items():
        for field in fields:
            yield from _started(known, ("software", name, field), [row.software == name for row in rows], 0.2)


def _expert_constants(rows: Sequence[Row], known: dict[str, Any]) -> Iterator[_Constant]:
    mixtures = known["mixtures"]
    for name in known["efficiencies"]:
        uses = [known["gpus"][row.gpu]["generation"] == name for row in rows]
        yield from _started(known, ("efficiencies", name, "expert_tokens"), uses, 0.2)
    for field in ("seconds", "passes", "exposed"):
        yield from _started(known, ("mixtures", field), [True] * len(rows), 0.2)
    for name in mixtures["generations"]:
        uses = [generation_of(mixtures, row.release) == name for row in rows]
        yield from _started(known, ("mixtures", "generations", name), uses, 0.2)


def _started(known: dict[str, Any], path: Path, uses: Sequence[bool], step: float) -> Iterator[_Constant]:
    """Yield the constant, set to its start, if any row uses it."""
    if any(uses):
        start: Any = _STARTS.get(path[-1], _STARTS.get(_field(path)))
        start = start[path[1]] if isinstance(start, dict) else start
        _put(known, path, start)
        weight = _EXPERTS_PRIOR if path[0] == "mixtures" or path[-1] == "expert_tokens" else _PRIOR
        yield _Constant(path, np.flatnonzero(uses), start, step, weight)


def _field(path: Path) -> str:
    """Return the name of the field; constants of one field by precision or generation share limits."""
    return path[-2] if path[-2] in ("gemm", "generations") else path[-1]


def _thinned(rows: Sequence[Row]) -> list[Row]:
    sweeps: dict[str, list[Row]] = {}
    for row in rows:
        sweeps.setdefault(row.sweep, []).append(row)
    return [row for sweep in sweeps.values() for row in sweep[:: -(-len(sweep) // _ROWS_A_SWEEP)]]


def _loss(error: np.ndarray) -> np.ndarray:
    return np.sqrt(error * error + _LINEAR_ABOVE**2) - _LINEAR_ABOVE


def _saturating_loss(error: np.ndarray) -> np.ndarray:
    return _SATURATES_ABOVE / 2 * np.log1p((error / _SATURATES_ABOVE) ** 2)


def _get(known: dict[str, Any], path: Path) -> float:
    for key in path[:-1]:
        known = known[key]
    return float(known[path[-1]])


def _put(known: dict[str, Any], path: Path, value: float) -> None:
    for key in path[:-1]:
        known = known[key]
    known[path[-1]] = value
