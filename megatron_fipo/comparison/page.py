"""The page of a comparison: what was found, per-seed differences as a figure, power, runs, and how to read it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from matplotlib.ticker import MaxNLocator

from megatron_fipo.comparison.analysis import Comparison
from megatron_fipo.comparison.results import Results
from megatron_fipo.comparison.tables import (
    NONE,
    TextTable,
    arm_table,
    comparison_table,
    power_table,
    statements,
)
from megatron_fipo.report.panels import BLUE, GREY, INK, ORANGE, empty_figure, style, to_png
from megatron_fipo.report.parts import document, figure, figure_text, table

_READING = """
<ul>
<li>A pair is one seed with both arms: same base model, same order of prompts, same seeds of samples. The effect is the
mean difference over seeds; of a length it is a ratio.</li>
<li>p and interval: paired t test. Holm p: corrected for all comparisons of the endpoint. Sign-flip p: exact, without an
assumption about the distribution; with n pairs it is at least 2<sup>1-n</sup>.</li>
<li>An arm is named as higher only if the corrected p value and the corrected interval both exclude that there is no
difference, all pairs are finished, and the result holds with failed pairs as the worst case: each as far against the
effect as the largest difference of a finished pair.</li>
<li>Power: the probability to detect the smallest difference of interest with these pairs, at their standard deviation
and at the strictest level of the correction.</li>
<li>Seed x problem: bootstrap interval over seeds and problems, without correction.</li>
</ul>
"""


def comparison_page(results: Results, link: str) -> str:
    """Return the page. `link`: HTML of a link to the learning curves; "" for none."""
    found = "\n".join(f"<li>{escape(text)}</li>" for text in statements(results))
    figures = [_figure(results, name) for name in results.tables]
    body = [
        f"<p>{escape(_runs_text(results))}</p>{link}",
        _html(comparison_table(results)),
        f"<ul>\n{found}\n</ul>",
        f"<h2>Differences</h2>\n<div class=grid>{''.join(figures)}</div>",
        f"<h2>Power</h2>\n{_html(power_table(results))}",
        f"<h2>Arms</h2>\n{_html(arm_table(results))}",
        _settings(results),
        f"<details><summary>Every run</summary>{_html(_run_table(results))}</details>",
        f"<h2>How to read it</h2>{_READING}",
    ]
    return document(f"Comparison {results.spec.out.name}", "\n".join(body))


def _html(shown: TextTable) -> str:
    return table(*shown, {0: "text", 1: "text"} if shown[0][1] == "comparison" else None)


def _runs_text(results: Results) -> str:
    counts = {
        s: sum(one.status == s for one in results.states) for s in ("finished", "failed", "unfinished", "missing")
    }
    return f"{len(results.runs)} runs: " + ", ".join(f"{n} {status}" for status, n in counts.items() if n) + "."


def _settings(results: Results) -> str:
    spec = results.spec
    shared = [["all", f"{spec.config} " + _settings_text(spec.settings)]]
    lines = shared + [[arm, _settings_text(values) or "as in the config"] for arm, values in spec.arms.items()]
    endpoints = [
        [e.name, f"{'log of the ' if e.log else ''}mean of the last {e.last} values of {e.metric}"]
        for e in spec.endpoints
    ]
    return table(["", "settings"], lines, {1: "text"}) + "<br>" + table(["endpoint", ""], endpoints, {1: "text"})


def _settings_text(values: object) -> str:
    assert isinstance(values, dict)
    return " ".join(f"{key}={value}" for key, value in values.items())


def _run_table(results: Results) -> TextTable:
    lines = []
    for run, state in zip(results.runs, results.states, strict=True):
        values = [of.get((run.arm, run.seed)) for of in results.tables.values()]
        shown = [NONE if value is None else f"{value:.5g}" for value in values]
        lines.append([run.name, state.status, str(state.failures), *shown, state.cause])
    return ["run", "state", "failed attempts", *results.tables, ""], lines


def _figure(results: Results, endpoint: str) -> str:
    """Return a figure with each comparison's differences, one dot per seed, and its mean with the interval."""
    comparisons = [one for one in results.comparisons if one.endpoint.name == endpoint and one.differences]
    if not comparisons:
        return ""
    drawn, (axes,) = empty_figure(f"Differences in {endpoint}", 1)
    for place, one in enumerate(comparisons):
        values = np.array(list(one.differences.values()))
        offsets = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else np.zeros(1)
        axes.scatter(values, place + 0.18 + offsets, s=14, color=BLUE, alpha=0.6, linewidths=0)
        axes.plot([values.mean()], [place - 0.15], marker="o", markersize=5, color=ORANGE)
        if one.plain is not None:
            axes.plot(one.plain, [place - 0.15] * 2, color=ORANGE, linewidth=2)
    style(axes, _unit(comparisons), log=False)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.axvline(0.0, color=GREY, linewidth=0.9)
    axes.set_yticks(range(len(comparisons)), [figure_text(one.name) for one in comparisons])
    axes.set_ylim(len(comparisons) - 0.5, -0.5)
    axes.set_xlabel("difference", color=INK)
    drawn.subplots_adjust(left=0.2)
    caption = "Blue: one dot per seed. Orange: their mean with its interval, without correction."
    return figure(f"Differences in {endpoint}", caption, to_png(drawn))


def _unit(comparisons: Sequence[Comparison]) -> str:
    endpoint = comparisons[0].endpoint
    return f"{'log ' if endpoint.log else ''}{endpoint.metric}, a - b"
