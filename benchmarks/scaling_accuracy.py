"""Accuracy of the layout planner: its cost and memory model against published runs.

    python benchmarks/scaling_accuracy.py [ROWS.csv] [--feasibility LAYOUTS.csv]
    python benchmarks/scaling_accuracy.py --fit 16      # writes megatron_fipo/scaling/cost/efficiency.yaml

Every row with a layout and a measurement is predicted by the planner's cost model with the constants of
efficiency.yaml, which were fitted on every other source of data/published_throughput.csv (by name, among those of one
GPU generation, dense and mixtures of experts apart; the file lists them). All other sources, pull requests, and all
rows of another file are held out. Constants of experts have a factor for each generation of the training code, which
the column `release` selects. Errors are |predicted - measured| / measured step time; the rank correlation is
Spearman's, of time per token and GPU, within each sweep of five rows or more, averaged over sweeps weighted by rows.
The naive predictor uses the median model FLOP/s of all these rows per GPU and precision. Skipped rows are counted by
reason; runs of mixtures that are mispredicted by more than 30% are listed.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from efficiency_fit import fit
from megatron_fipo.scaling.cost import hardware
from megatron_fipo.scaling.cost.hardware import hardware_files
from megatron_fipo.scaling.cost.memory import estimated_memory
from published_names import Unusable
from published_rows import THROUGHPUT, Row, fitted_sources, hardware_of, parse, predict, read_rows, sweeps

EFFICIENCY = Path(hardware.__file__).with_name("efficiency.yaml")
FEASIBILITY = THROUGHPUT.with_name("feasibility_oom.csv")
_MISPREDICTED = 0.3
Predicted = dict[int, float]  # by the row's identity


def summary(rows: Sequence[Row], seconds: Predicted) -> dict[str, Any]:
    """Return errors and rank correlation, None without rows or sweeps."""
    if not rows:
        return {"rows": 0, "median_abs_error": None, "p90_abs_error": None, "rank_correlation": None}
    error = np.array([abs(seconds[id(row)] / row.seconds - 1) for row in rows])
    ranked = [(len(sweep), _rank_correlation(sweep, seconds)) for sweep in sweeps(rows)]
    ranked = [(n, r) for n, r in ranked if r is not None]
    weighted = sum(n * r for n, r in ranked) / sum(n for n, _ in ranked) if ranked else None
    return {
        "rows": len(rows),
        "median_abs_error": float(np.median(error)),
        "p90_abs_error": float(np.quantile(error, 0.9)),
        "rank_correlation": weighted,
        "sweeps": len(ranked),
    }


def _rank_correlation(sweep: Sequence[Row], seconds: Predicted) -> float | None:
    """Return the correlation of time per token and GPU; None if all predictions or all measurements are equal."""
    share = [row.layout.parallel.world_size / row.batch.all_tokens for row in sweep]
    predicted = _ranks([seconds[id(row)] * s for row, s in zip(sweep, share, strict=True)])
    measured = _ranks([row.seconds * s for row, s in zip(sweep, share, strict=True)])
    if predicted.std() == 0 or measured.std() == 0:
        return None
    return float(np.corrcoef(predicted, measured)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Return ranks; ties share their mean rank."""
    order = np.array(values)
    return np.array([(order < v).sum() + (order == v).sum() / 2 for v in order])


def naive(rows: Sequence[Row], flops: dict[int, float]) -> Predicted:
    """Return step times at the median FLOP/s of the GPU and precision."""
    rates: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        rate = flops[id(row)] / row.seconds / row.layout.parallel.world_size
        rates.setdefault((row.gpu, row.precision), []).append(rate)
    return {
        id(row): flops[id(row)] / float(np.median(rates[row.gpu, row.precision])) / row.layout.parallel.world_size
        for row in rows
    }


def memory_confusion(rows: Sequence[Row], path: Path) -> dict[str, int]:
    """Compare layouts that ran, and those that ran out of memory in the same studies, with the planner."""
    failed = []
    with path.open(newline="") as file:
        for fields in csv.DictReader(file):
            if "OOM" not in (fields["outcome"] or ""):
                continue
            blank = dict.fromkeys(("ep", "tokens_per_s_per_gpu", "model_tflops_per_gpu", "mfu"), "")
            try:
                failed.append(parse({**blank, "step_time_s": "1", **{k: v or "" for k, v in fields.items()}}))
            except Unusable:
                continue
    studies = {row.source for row in failed}
    count: Counter[str] = Counter()
    for row in failed:
        count["oom_said_fits" if fits(row) else "oom_said_oom"] += 1
    for row in rows:
        if row.source in studies:
            count["ran_said_fits" if fits(row) else "ran_said_oom"] += 1
    return {k: count[k] for k in ("ran_said_fits", "ran_said_oom", "oom_said_fits", "oom_said_oom")}


def fits(row: Row) -> bool:
    """Return whether the planner predicts that the row fits."""
    gpu = hardware_of(row, hardware_files())
    stages = estimated_memory(row.model, gpu, row.layout, row.batch.tokens, row.batch.squares)
    most = max(stage.total for stage in stages)
    return most <= gpu.gpu.memory


def evaluate(path: Path, feasibility: Path | None) -> dict[str, Any]:
    """Print the tables and return the results."""
    console, known = Console(width=120), hardware_files()
    rows, left_out = read_rows(path)
    costs = [predict(row, known) for row in rows]
    seconds = {id(row): cost.seconds for row, cost in zip(rows, costs, strict=True)}
    guessed = naive(rows, {id(row): cost.model_flops for row, cost in zip(rows, costs, strict=True)})
    fitted = set(known["fitted_on"])
    held_out = [row for row in rows if row.source not in fitted]
    figures: dict[str, Any] = {"file": path.name, "left_out": len(left_out)}
    for name, moe in (("dense", False), ("moe", True)):
        selected = [row for row in rows if row.moe == moe]
        figures[name] = summary(selected, seconds)
        figures[name]["held_out"] = summary([row for row in held_out if row.moe == moe], seconds)
        figures[name]["naive"] = summary(selected, guessed)
    _show_sources(console, rows, seconds, guessed, fitted)
    _show_sweeps(console, rows, seconds)
    _show_mispredicted(console, rows, seconds, fitted)
    _show_summary(console, figures)
    for reason, count in Counter(reason for _, reason in left_out).most_common():
        console.print(f"left out: {count} rows, {reason}", highlight=False)
    if feasibility is not None:
        figures["memory"] = memory_confusion(rows, feasibility)
        _show_memory(console, figures["memory"])
    return figures


def _show_sources(console: Console, rows: list[Row], seconds: Predicted, guessed: Predicted, fitted: set[str]) -> None:
    table = Table(title="|error| of the step time by source")
    for column in ("source", "", "rows", "median", "p90", "naive median"):
        table.add_column(column, justify="left" if column in ("source", "") else "right", overflow="fold")
    for moe in (False, True):
        for source in sorted({row.source for row in rows if row.moe == moe}):
            selected = [row for row in rows if row.source == source and row.moe == moe]
            ours, simple = summary(selected, seconds), summary(selected, guessed)
            name = source.replace("github.com/", "").replace("NeurIPS-WANT-submission-efficient-parallelization-", "")
            kind = ("fitted" if source in fitted else "held out") + (", MoE" if moe else "")
            numbers = (ours["median_abs_error"], ours["p90_abs_error"], simple["median_abs_error"])
            table.add_row(name, kind, str(len(selected)), *(f"{x:.1%}" for x in numbers))
    console.print(table)


def _show_sweeps(console: Console, rows: list[Row], seconds: Predicted) -> None:
    table = Table(title="rank correlation by sweep, below 0.9")
    for column in ("sweep", "rows", "Spearman"):
        table.add_column(column, justify="left" if column == "sweep" else "right", overflow="fold")
    found = [(_rank_correlation(sweep, seconds), sweep) for sweep in sweeps(rows)]
    for value, sweep in sorted(((r, s) for r, s in found if r is not None and r < 0.9), key=lambda pair: pair[0]):
        name = sweep[0].sweep.split("/")[-1]
        table.add_row(name, str(len(sweep)), f"{value:.2f}")
    console.print(table)


def _show_mispredicted(console: Console, rows: list[Row], seconds: Predicted, fitted: set[str]) -> None:
    table = Table(title=f"mixtures of experts with |error| above {_MISPREDICTED:.0%}")
    for column in ("model", "", "GPU", "release", "layout", "measured s", "predicted"):
        table.add_column(column, justify="right" if column in ("measured s", "predicted") else "left")
    found = [(seconds[id(row)] / row.seconds - 1, row) for row in rows if row.moe]
    for error, row in sorted((x for x in found if abs(x[0]) > _MISPREDICTED), key=lambda x: x[0]):
        where = f"{row.layout.parallel.world_size} GPUs, {row.layout}"
        kind, precision = "fitted" if row.source in fitted else "held out", row.fields["precision"]
        values = (f"{row.gpu} {precision}", row.release, where, f"{row.seconds:.2f}", f"{error:+.0%}")
        table.add_row(row.fields["model"], kind, *values)
    console.print(table)


def _show_summary(console: Console, figures: dict[str, Any]) -> None:
    table = Table(title="all")
    for column in ("", "rows", "median", "p90", "rank correlation"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("dense", "moe"):
        for label, part in (("", figures[name]), *((f", {k}", figures[name][k]) for k in ("held_out", "naive"))):
            values = [part["median_abs_error"], part["p90_abs_error"]]
            shown = ["-" if v is None else f"{v:.1%}" for v in values]
            rank = part["rank_correlation"]
            table.add_row(name + label, str(part["rows"]), *shown, "-" if rank is None else f"{rank:.3f}")
    console.print(table)


def _show_memory(console: Console, count: dict[str, int]) -> None:
    right = count["ran_said_fits"] + count["oom_said_oom"]
    table = Table(title=f"does it fit: right for {right} of {sum(count.values())} layouts")
    for column in ("", "said to fit", "said not to"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("ran", str(count["ran_said_fits"]), str(count["ran_said_oom"]))
    table.add_row("out of memory", str(count["oom_said_fits"]), str(count["oom_said_oom"]))
    console.print(table)


def write_fit(rounds: int) -> None:
    """Fit the constants and write the file."""
    rows, _ = read_rows(THROUGHPUT)
    known, sources = hardware_files(), fitted_sources(rows)
    known = fit([row for row in rows if row.source in set(sources)], known, rounds)
    content = {key: known[key] for key in ("efficiencies", "mixtures", "software")}
    header = (
        "# Written by `python benchmarks/scaling_accuracy.py --fit ROUNDS`;\n"
        "# megatron_fipo/scaling/cost/hardware.py has the fields. Constants of megatron_fipo itself are derived,\n"
        "# not fitted: no published table includes it.\n"
    )
    temporary = EFFICIENCY.with_suffix(".yaml.new")
    temporary.write_text(header + OmegaConf.to_yaml(OmegaConf.create({**_rounded(content), "fitted_on": sources})))
    temporary.replace(EFFICIENCY)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", type=Path, default=THROUGHPUT)
    parser.add_argument("--feasibility", type=Path, help="layouts that ran out of memory")
    parser.add_argument("--fit", type=int, metavar="ROUNDS", help="rounds of the coordinate search")
    arguments = parser.parse_args()
    if arguments.fit:
        write_fit(arguments.fit)
        hardware_files.cache_clear()
    feasibility = arguments.feasibility or (FEASIBILITY if arguments.rows == THROUGHPUT else None)
    print(json.dumps(evaluate(arguments.rows, feasibility)))


if __name__ == "__main__":
    main()
