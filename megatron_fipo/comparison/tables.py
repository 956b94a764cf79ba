"""Results as tables of text, for the terminal and the page, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table as RichTable

from megatron_fipo.comparison.analysis import Comparison, Interval
from megatron_fipo.comparison.results import Results
from megatron_fipo.comparison.spec import Endpoint
from megatron_fipo.report.parts import terminal_text

TextTable = tuple[list[str], list[list[str]]]  # column names and rows
NONE = "-"


def difference_text(endpoint: Endpoint, value: float) -> str:
    """Return a difference with its sign; of a logarithm as a percentage of the arm that is subtracted."""
    return f"{math.expm1(value):+.1%}" if endpoint.log else f"{value:+.3g}"


def interval_text(endpoint: Endpoint, interval: Interval | None) -> str:
    """Return an interval of differences."""
    if interval is None:
        return NONE
    return f"[{difference_text(endpoint, interval[0])}, {difference_text(endpoint, interval[1])}]"


def p_text(p: float | None) -> str:
    """Return a p value with two significant digits."""
    return NONE if p is None else f"{p:.2g}" if p >= 1e-4 else "<0.0001"


def comparison_table(results: Results) -> TextTable:
    """Return a line per endpoint and pair of arms: effect, interval, p values, winner."""
    level = f"{1 - results.spec.error_rate:.3g}".removeprefix("0.") if results.spec.error_rate != 0.05 else "95"
    head = ["endpoint", "comparison", "pairs", "effect", f"{level}% interval", "p", "Holm p", "sign-flip p", "higher"]
    return head, [_comparison_line(one, len(results.spec.seeds)) for one in results.comparisons]


def _comparison_line(one: Comparison, planned: int) -> list[str]:
    pairs = f"{len(one.differences)} of {planned}"
    if one.tested is None or one.signs is None:
        return [one.endpoint.name, one.name, pairs, *[NONE] * 6]
    found = one.tested.estimate
    error = f" ±{one.signs.error:.1g}" if one.signs.error else ""
    return [
        one.endpoint.name,
        one.name,
        pairs,
        difference_text(one.endpoint, found.effect),
        interval_text(one.endpoint, one.plain),
        p_text(found.p),
        p_text(one.tested.adjusted.p if found.p is not None else None),
        p_text(one.signs.p) + error,
        one.winner or NONE,
    ]


def power_table(results: Results) -> TextTable:
    """Return a line per comparison: its spread, what it could show, and how many pairs more would need."""
    head = [
        "endpoint",
        "comparison",
        "SD of a pair",
        "shown with 80%",
        "smallest of interest",
        "power",
        "pairs for 80%",
    ]
    head.append("seed x problem")
    lines = []
    for one in results.comparisons:
        bootstrap = interval_text(one.endpoint, results.bootstrap.get((one.endpoint.name, one.name)))
        cells, found = [NONE] * 5, results.power_of(one)
        if found is not None and one.tested is not None:
            cells = [
                f"{one.tested.estimate.sd:.3g}",
                difference_text(one.endpoint, found.detectable).lstrip("+"),
                f"{found.smallest:.1%}" if one.endpoint.log else f"{found.smallest:.3g}",
                f"{found.reached:.2f}",
                f"{found.needed:,}" if found.needed else "over 100,000",
            ]
        lines.append([one.endpoint.name, one.name, *cells, bootstrap])
    return head, lines


def arm_table(results: Results) -> TextTable:
    """Return a line per arm: its runs, and its endpoints over the seeds that all arms have."""
    spec = results.spec
    head = ["arm", "finished", "failed", "unfinished", "missing", *(_endpoint_head(results, e) for e in spec.endpoints)]
    lines = [
        [
            arm,
            *(str(results.count(arm, status)) for status in ("finished", "failed", "unfinished", "missing")),
            *(_mean_text(results, arm, endpoint) for endpoint in spec.endpoints),
        ]
        for arm in spec.arms
    ]
    return head, lines


def _endpoint_head(results: Results, endpoint: Endpoint) -> str:
    return f"{endpoint.name} ({len(results.common_seeds(endpoint))} seeds)"


def _mean_text(results: Results, arm: str, endpoint: Endpoint) -> str:
    found = results.mean_of(arm, endpoint)
    if found is None:
        return NONE
    middle, spread = found
    if endpoint.log:  # back from the logarithm: the geometric mean, and the spread as a share of it
        return f"{math.exp(middle):.4g}" + (f" ±{math.expm1(spread):.1%}" if spread is not None else "")
    return f"{middle:.4g}" + (f" ±{spread:.2g}" if spread is not None else "")


def statements(results: Results) -> list[str]:
    """Return a sentence per comparison, and one for everything that a reader must know of the runs."""
    found = [_statement(one, results.spec.error_rate) for one in results.comparisons]
    for run, state in zip(results.runs, results.states, strict=True):
        if state.status == "failed":
            found.append(f"{run.name} failed: {state.cause or 'see its log'}")
        elif state.status == "finished" and state.failures:
            found.append(f"{run.name} finished after {state.failures} failed attempts")
        elif state.status == "unfinished" and state.cause:
            found.append(f"{run.name} is unfinished: {state.cause}")
    if results.added:
        found.append(
            f"seeds {', '.join(map(str, results.added))} were added after the first runs: if that was decided by their "
            "result, p values are too small"
        )
    return [*found, *results.notes]


def _statement(one: Comparison, error_rate: float) -> str:
    what = f"{one.endpoint.name}, {one.name}"
    if one.winner is None:
        return f"{what}: {one.reason}"
    assert one.tested is not None
    assert one.signs_adjusted is not None
    share = one.tested.adjusted.share
    effect = difference_text(one.endpoint, abs(one.tested.estimate.effect)).lstrip("+")
    text = (
        f"{what}: {one.winner} is higher by {effect}"
        f" (corrected interval {interval_text(one.endpoint, one.tested.interval)}, level 1/{share} of the error rate)"
    )
    if one.failed:
        text += f", also with failed seeds {', '.join(map(str, one.failed))} as the worst case"
    if one.signs_adjusted > error_rate:
        p = p_text(one.signs_adjusted)
        text += f". It rests on differences with a normal distribution: without, the sign-flip test's p is {p} (Holm)"
    return text


def terminal_report(results: Results) -> str:
    """Return the results for a terminal of 100 columns."""
    tables = [_rich(*comparison_table(results)), _rich(*power_table(results)), _rich(*arm_table(results))]
    return "\n".join([terminal_text(*tables), "", *statements(results)])


def _rich(head: Sequence[str], lines: Sequence[Sequence[str]]) -> RichTable:
    shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, name in enumerate(head):
        shown.add_column(name, justify="right" if index > 1 else "left", overflow="fold")
    for line in lines:
        shown.add_row(*line)
    return shown


def as_json(results: Results) -> str:
    """Return everything as JSON; differences of logarithms stay logarithms."""
    content = {
        "spec": {**results.spec.fixed(), "seeds": list(results.spec.seeds), "added": list(results.added)},
        "runs": [
            {"arm": r.arm, "seed": r.seed, "directory": str(r.directory), **asdict(s)}
            | {e: table.get((r.arm, r.seed)) for e, table in results.tables.items()}
            for r, s in zip(results.runs, results.states, strict=True)
        ],
        "comparisons": [_comparison_json(one, results) for one in results.comparisons],
        "notes": list(results.notes),
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


def _comparison_json(one: Comparison, results: Results) -> dict[str, Any]:
    content = asdict(one) | {"endpoint": one.endpoint.name}
    found = results.power_of(one)
    content["power"] = None if found is None else asdict(found)
    content["bootstrap"] = results.bootstrap.get((one.endpoint.name, one.name))
    content["differences"] = {str(seed): value for seed, value in one.differences.items()}
    return content
