"""Summary of an evaluation: Avg@k, Cons@k and Pass@k with confidence intervals, and response lengths.

With several benchmarks, scores and their intervals are means over benchmarks, whatever their sizes; lengths are over
all samples. The benchmark that selects the best checkpoint has its own scores and is no part of the means.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from zlib import crc32

import numpy as np

from megatron_fipo.evaluation.estimators import Floats, consensus, interval, pass_at, resampled_means
from megatron_fipo.evaluation.sample import Sample
from megatron_fipo.former_names import current_evaluation, current_lengths

_QUANTILES = {"q10": 0.1, "q25": 0.25, "median": 0.5, "q75": 0.75, "q90": 0.9, "max": 1.0}


@dataclass(frozen=True)
class Evaluation:
    """Metrics over k samples per problem.

    Attributes:
        avg: mean accuracy of all samples.
        cons: expected share of problems whose most frequent answer is correct, with ties broken at random; no answer
            counts as one incorrect answer. None in the evaluation of an earlier release.
        pass_: share of problems with at least one correct sample.
        length: mean response length, tokens.
        truncated: share of responses that reached the length limit.
        pass_at: `pass@j` for several j <= k.
        intervals: score name -> ends of its 95% bootstrap interval over problems.
        lengths: quantiles of the response length; mean and median of correct and of incorrect responses, if any.
        benchmarks: metrics of each benchmark if there are several.
        verifier_failures: reason -> number of answers that the verifier could not decide; they count as incorrect.
        cons_answered: `cons` of the samples with an answer alone; 0 for a problem without any.
        answered: share of samples with an answer. None in the evaluation of an earlier release.
    """

    samples: int
    problems: int
    avg: float
    cons: float | None
    pass_: float
    length: float
    truncated: float
    pass_at: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    lengths: Mapping[str, float] = field(default_factory=dict)
    benchmarks: Mapping[str, Evaluation] = field(default_factory=dict)
    verifier_failures: Mapping[str, int] = field(default_factory=dict)
    cons_answered: float | None = None
    answered: float | None = None

    def scores(self) -> dict[str, float]:
        """Return the scores that are known by their names."""
        values = {"avg@k": self.avg, "cons@k": self.cons, "cons_answered@k": self.cons_answered, "pass@k": self.pass_}
        return {name: value for name, value in values.items() if value is not None}

    def metrics(self) -> dict[str, float]:
        """Return all metrics by their names in metrics.jsonl; `eval/<benchmark>/...` if there are several."""
        figures = {f"eval/{name}": value for name, value in self._figures()}
        for benchmark, result in self.benchmarks.items():
            figures |= {f"eval/{benchmark}/{name}": value for name, value in result._figures()}
        return figures

    def _figures(self) -> Iterator[tuple[str, float]]:
        yield from {**self.scores(), **self.pass_at, "length": self.length, "truncated": self.truncated}.items()
        if self.answered is not None:
            yield "answered", self.answered
        yield from ((f"length/{name}", value) for name, value in self.lengths.items())
        yield from ((f"verifier_{name}s", float(count)) for name, count in self.verifier_failures.items())
        for name, (low, high) in self.intervals.items():
            yield f"{name}/low", low
            yield f"{name}/high", high

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> Evaluation:
        """Rebuild from `dataclasses.asdict`, also after a JSON round trip or from an earlier release's metrics."""
        state = current_evaluation(state)
        nested: dict[str, Any] = {
            "lengths": current_lengths(state.get("lengths", {})),
            "intervals": {name: tuple(ends) for name, ends in state.get("intervals", {}).items()},
            "benchmarks": {n: Evaluation.from_state_dict(e) for n, e in state.get("benchmarks", {}).items()},
        }
        return Evaluation(**{**state, **nested})


def summarize(
    samples: Sequence[Sample], pass_k: Sequence[int] | None = None, seed: int = 0, selection: str | None = None
) -> Evaluation:
    """Return the metrics of a finished evaluation; samples may be in any order.

    Args:
        pass_k: the j of each `pass@j`; None: the powers of two up to k, and k.
        seed: seed of the bootstrap.
        selection: benchmark that selects the best checkpoint, left out of what is over all benchmarks.

    Raises:
        ValueError: problems with different numbers of samples, no samples, or a j above k.
    """
    parts = _by_benchmark(samples)
    counts = {len(answers) for problems in parts.values() for answers in problems}
    if len(counts) != 1:
        raise ValueError(f"all problems must have the same number of samples, got {sorted(counts)}")
    k = counts.pop()
    wanted = powers_of_two(k) if pass_k is None else sorted(set(pass_k))
    names = ["avg@k", "cons@k", "cons_answered@k", "pass@k", *(f"pass@{j}" for j in wanted)]
    figures = {name: _scores_by_problem(problems, k, wanted) for name, problems in parts.items()}
    resampled = {name: resampled_means(values, (seed, crc32(name.encode()))) for name, values in figures.items()}
    each = {
        name: _evaluation(
            list(chain.from_iterable(problems)), k, len(problems), names, figures[name].mean(0), resampled[name]
        )
        for name, problems in parts.items()
    }
    if len(each) == 1:
        return next(iter(each.values()))
    reported = [name for name in parts if name != selection]
    means = np.mean([figures[name].mean(0) for name in reported], axis=0)
    together = np.mean([resampled[name] for name in reported], axis=0)
    total = sum(len(parts[name]) for name in reported)
    return _evaluation([s for s in samples if s.benchmark != selection], k, total, names, means, together, each)


def powers_of_two(k: int) -> list[int]:
    """Return 1, 2, 4, ... up to k, and k itself."""
    return sorted({*(1 << n for n in range(k.bit_length())), k})


def _by_benchmark(samples: Sequence[Sample]) -> dict[str, list[list[Sample]]]:
    """Group samples by benchmark and problem, in a fixed order."""
    parts: dict[str, dict[int, list[Sample]]] = {}
    for sample in samples:
        parts.setdefault(sample.benchmark, {}).setdefault(sample.problem, []).append(sample)
    return {name: [problems[p] for p in sorted(problems)] for name, problems in sorted(parts.items())}


def _scores_by_problem(problems: Sequence[Sequence[Sample]], k: int, wanted: Sequence[int]) -> Floats:
    """Return [P, M]: each problem's accuracy, consensus, consensus of answers, pass@k and every further pass@j."""
    correct = [sum(s.accuracy > 0 for s in answers) for answers in problems]
    columns = [
        np.array([sum(s.accuracy for s in answers) / k for answers in problems]),
        np.array([consensus([s.answer_class for s in answers]) for answers in problems]),
        np.array([consensus([s.answer_class for s in answers], answered=True) for answers in problems]),
        *(pass_at(j, k, correct) for j in (k, *wanted)),
    ]
    return np.stack(columns, axis=1)


def _evaluation(
    samples: Sequence[Sample],
    k: int,
    problems: int,
    names: Sequence[str],
    means: Floats,
    resampled: Floats,
    benchmarks: Mapping[str, Evaluation] | None = None,
) -> Evaluation:
    scores = dict(zip(names, means.tolist(), strict=True))
    ends = zip(*interval(resampled).tolist(), strict=True)
    avg, cons, cons_answered, pass_ = (scores.pop(name) for name in names[:4])
    return Evaluation(
        samples=k,
        problems=problems,
        avg=avg,
        cons=cons,
        pass_=pass_,
        length=sum(s.length for s in samples) / len(samples),
        truncated=sum(s.truncated for s in samples) / len(samples),
        pass_at=scores,
        intervals={name: (low, high) for name, (low, high) in zip(names, ends, strict=True)},
        lengths=_lengths(samples),
        benchmarks=benchmarks or {},
        verifier_failures=dict(Counter(s.failure for s in samples if s.failure)),
        cons_answered=cons_answered,
        answered=sum(s.answer is not None for s in samples) / len(samples),
    )


def _lengths(samples: Sequence[Sample]) -> dict[str, float]:
    quantiles = np.quantile([s.length for s in samples], list(_QUANTILES.values())).tolist()
    lengths = dict(zip(_QUANTILES, quantiles, strict=True))
    for name, correct in (("correct", True), ("incorrect", False)):
        some = [s.length for s in samples if (s.accuracy > 0) == correct]
        if some:
            lengths |= {name: float(np.mean(some)), f"{name}_median": float(np.median(some))}
    return lengths
