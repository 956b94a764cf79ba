"""Endpoints of finished runs, and the accuracy of each problem behind a score.

S: seeds, P: problems of a benchmark.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_fipo.comparison.spec import Endpoint
from megatron_fipo.report.history import Row, Run

_COLUMNS = ["benchmark", "problem", "prompt", "accuracy"]


def endpoint_value(run: Run, endpoint: Endpoint) -> float:
    """Return an endpoint of a finished run.

    Raises:
        ValueError: one of the values is missing or not finite, or a mean whose logarithm is asked for is not positive.
    """
    rows = _last_rows(run, endpoint)
    missing = [int(row["step"]) for row in rows if not math.isfinite(row.get(endpoint.metric, math.nan))]
    if len(rows) < endpoint.last or missing:
        where = (
            f"at step {missing[0]}" if missing else f"in {endpoint.last - len(rows)} of the last {endpoint.last} rows"
        )
        raise ValueError(f"{run.directory}: {endpoint.metric} has no finite value {where}")
    mean = sum(row[endpoint.metric] for row in rows) / len(rows)
    if not endpoint.log:
        return mean
    if mean <= 0:
        raise ValueError(f"{run.directory}: the mean of {endpoint.metric} is {mean:g}, which has no logarithm")
    return math.log(mean)


def _last_rows(run: Run, endpoint: Endpoint) -> list[Row]:
    rows = [row for row in run.evaluations if row["step"] > 0] if endpoint.is_of_evaluations else run.trained
    return rows[-endpoint.last :]


Accuracies = dict[str, dict[tuple[int, str], float]]  # benchmark -> (problem, its prompt) -> mean accuracy


def problem_accuracies(run: Run, endpoint: Endpoint) -> Accuracies | None:
    """Return each problem's mean accuracy over the endpoint's evaluations; None without saved samples (`eval.save`)."""
    sums: dict[str, dict[tuple[int, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in _last_rows(run, endpoint):
        path = run.directory / "evaluation" / f"step_{int(row['step'])}.parquet"
        if not path.is_file():
            return None
        for sample in _samples(path):
            sums[sample["benchmark"]][sample["problem"], str(sample["prompt"])].append(sample["accuracy"])
    return {name: {key: float(np.mean(values)) for key, values in of.items()} for name, of in sums.items()}


def _samples(path: Path) -> list[dict]:
    try:
        return pq.read_table(path, columns=_COLUMNS).to_pylist()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def problem_differences(
    of_a: Sequence[Accuracies], of_b: Sequence[Accuracies]
) -> Mapping[str, NDArray[np.float64]] | None:
    """Return benchmark -> [S, P]: differences of accuracy; None unless all runs were evaluated on the same problems.

    Args:
        of_a, of_b: one per seed, in the same order.
    """
    problems = {name: sorted(of) for name, of in of_a[0].items()}
    if any({name: sorted(of) for name, of in run.items()} != problems for run in (*of_a, *of_b)):
        return None
    return {
        name: np.array([[a[name][key] - b[name][key] for key in keys] for a, b in zip(of_a, of_b, strict=True)])
        for name, keys in problems.items()
    }
