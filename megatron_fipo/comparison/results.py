"""Results of a comparison, read from the directories of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from megatron_fipo.comparison.analysis import Comparison, Interval, Power, Table, compare, power_of
from megatron_fipo.comparison.endpoints import Accuracies, endpoint_value, problem_accuracies, problem_differences
from megatron_fipo.comparison.runs import PlannedRun, RunState, state_of
from megatron_fipo.comparison.spec import Endpoint, Spec
from megatron_fipo.comparison.statistics.bootstrap import seed_problem_interval
from megatron_fipo.report.history import Run, read_run


@dataclass(frozen=True)
class Results:
    """Results so far.

    Attributes:
        states: how far each run is, in their order.
        tables: endpoint's name -> (arm, seed) -> value; None: the run failed, or its endpoint is not finite.
        notes: runs that finished without a finite endpoint, and why a bootstrap interval is missing.
        comparisons: by endpoint, in the order of the specification.
        bootstrap: (endpoint's name, comparison's name) -> seed x problem interval.
        added: seeds that were added after the first run was started.
    """

    spec: Spec
    runs: Sequence[PlannedRun]
    states: Sequence[RunState]
    tables: Mapping[str, Table]
    notes: Sequence[str]
    comparisons: Sequence[Comparison]
    bootstrap: Mapping[tuple[str, str], Interval]
    added: Sequence[int] = ()

    def count(self, arm: str, *statuses: str) -> int:
        """Return the number of an arm's runs in these states."""
        return sum(run.arm == arm and s.status in statuses for run, s in zip(self.runs, self.states, strict=True))

    def common_seeds(self, endpoint: Endpoint) -> list[int]:
        """Return the seeds of which every arm has a value, so that means of arms are over the same seeds."""
        table = self.tables[endpoint.name]
        return [s for s in self.spec.seeds if all(table.get((arm, s)) is not None for arm in self.spec.arms)]

    def power_of(self, comparison: Comparison) -> Power | None:
        """Return what a comparison can show at the strictest level of Holm's correction; None without a spread."""
        return power_of(comparison, self.spec.error_rate / len(self.spec.pairs))

    def mean_of(self, arm: str, endpoint: Endpoint) -> tuple[float, float | None] | None:
        """Return an arm's mean and sample standard deviation over the common seeds; None without any."""
        table = self.tables[endpoint.name]
        values = [value for s in self.common_seeds(endpoint) if (value := table[arm, s]) is not None]
        return (mean(values), stdev(values) if len(values) > 1 else None) if values else None


def read_results(spec: Spec, runs: Sequence[PlannedRun], added: Sequence[int] = ()) -> Results:
    """Read all runs, and compare.

    Raises:
        ValueError: a file of a run is damaged.
    """
    states = [state_of(run) for run in runs]
    read = {
        (run.arm, run.seed): read_run(run.directory, reflection=False)
        for run, state in zip(runs, states, strict=True)
        if state.status == "finished"
    }
    failed = {(r.arm, r.seed) for r, state in zip(runs, states, strict=True) if state.status == "failed"}
    notes: list[str] = []
    tables = {e.name: _table(e, read, failed, notes) for e in spec.endpoints}
    comparisons = [
        one for e in spec.endpoints for one in compare(e, spec.pairs, spec.seeds, tables[e.name], spec.error_rate)
    ]
    bootstrap = _bootstrap(spec, comparisons, read, notes)
    return Results(spec, runs, states, tables, notes, comparisons, bootstrap, added)


def _table(
    endpoint: Endpoint, read: Mapping[tuple[str, int], Run], failed: set[tuple[str, int]], notes: list[str]
) -> Table:
    table: dict[tuple[str, int], float | None] = dict.fromkeys(failed)
    for key, run in read.items():
        try:
            table[key] = endpoint_value(run, endpoint)
        except ValueError as error:
            table[key] = None
            notes.append(f"{endpoint.name}: counted as failed: {error}")
    return table


def _bootstrap(
    spec: Spec, comparisons: Sequence[Comparison], read: Mapping[tuple[str, int], Run], notes: list[str]
) -> dict[tuple[str, str], Interval]:
    """Return the seed x problem interval of each comparison of scores that has two pairs."""
    found = {}
    accuracies: dict[tuple[str, int], Accuracies | None] = {}
    for one in comparisons:
        seeds = list(one.differences)
        if one.endpoint.metric != "eval/avg@k" or len(seeds) < 2:
            continue
        for key in ((arm, seed) for arm in (one.a, one.b) for seed in seeds):
            if key not in accuracies:
                accuracies[key] = problem_accuracies(read[key], one.endpoint)
        of_a, of_b = ([accuracies[arm, seed] for seed in seeds] for arm in (one.a, one.b))
        a, b = [x for x in of_a if x is not None], [x for x in of_b if x is not None]
        if len(a) + len(b) < 2 * len(seeds):
            notes.append(f"{one.endpoint.name}, {one.name}: no bootstrap, since samples were not saved (eval.save)")
        elif (differences := problem_differences(a, b)) is None:
            notes.append(f"{one.endpoint.name}, {one.name}: no bootstrap, since seeds were evaluated on other problems")
        else:
            found[one.endpoint.name, one.name] = seed_problem_interval(differences, 1.0 - spec.error_rate)
    return found
