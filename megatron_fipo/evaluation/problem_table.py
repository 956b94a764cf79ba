"""Table of problems: number of correct samples, and the majority answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from megatron_fipo.data import Prompt
from megatron_fipo.evaluation.estimators import consensus
from megatron_fipo.evaluation.sample import Sample


def problem_table(samples: Sequence[Sample], benchmarks: Mapping[str, Sequence[Prompt]]) -> pa.Table:
    """Return the table of finished samples, in their order."""
    problems: dict[tuple[str, int], list[Sample]] = {}
    for sample in samples:
        problems.setdefault((sample.benchmark, sample.problem), []).append(sample)
    return pa.Table.from_pylist([_row(answers, benchmarks[name][index]) for (name, index), answers in problems.items()])


def _row(answers: Sequence[Sample], prompt: Prompt) -> dict[str, Any]:
    votes = Counter(s.answer_class for s in answers)  # None: no answer, which votes too
    winner, most = votes.most_common(1)[0]
    return {
        "benchmark": answers[0].benchmark,
        "problem": answers[0].problem,
        "row": prompt.index,
        "ground_truth": prompt.ground_truth,
        "samples": len(answers),
        "correct": sum(s.accuracy > 0 for s in answers),
        "cons": consensus([s.answer_class for s in answers]),
        "cons_answered": consensus([s.answer_class for s in answers], answered=True),
        "majority": next(s.answer for s in answers if s.answer_class == winner),  # null: no answer
        "majority_votes": most,
        "different_answers": len(votes.keys() - {None}),
        "without_answer": sum(s.answer is None for s in answers),
        "length": sum(s.length for s in answers) / len(answers),
        "truncated": sum(s.truncated for s in answers),
    }
