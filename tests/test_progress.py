"""How far a run is, as checkpoints keep it."""

from __future__ import annotations

import json
from dataclasses import replace

from megatron_fipo.evaluation import Evaluation
from megatron_fipo.resume import Progress

EVALUATION = Evaluation(samples=2, problems=4, avg=0.5, cons=0.25, pass_=0.75, length=7.5, truncated=0.0)


def test_progress_through_json() -> None:
    """Evaluations and unlogged metrics come back as they were, to the last bit."""
    progress = Progress(3, EVALUATION, replace(EVALUATION, avg=0.1 + 0.2), 0.5, {"a": 1 / 3}, 12.25)
    assert Progress.from_state_dict(json.loads(json.dumps(progress.state_dict()))) == progress
    assert Progress.from_state_dict(json.loads(json.dumps(Progress().state_dict()))) == Progress()
    several = replace(EVALUATION, intervals={"avg@k": (0.25, 0.75)}, pass_at={"pass@1": 0.5}, lengths={"max": 9.0})
    progress = Progress(before=replace(several, benchmarks={"a": several, "b": EVALUATION}))
    assert Progress.from_state_dict(json.loads(json.dumps(progress.state_dict()))) == progress


def test_progress_of_evaluations() -> None:
    """The first stays, the newest replaces the last, the best is a maximum; none changes nothing."""
    worse, better = replace(EVALUATION, avg=0.4), replace(EVALUATION, avg=0.6)
    progress = Progress().evaluated(EVALUATION).evaluated(better).evaluated(worse)
    assert (progress.before, progress.after, progress.best) == (EVALUATION, worse, 0.6)
    assert progress.evaluated(None) is progress


def test_best_of_the_selecting_benchmark() -> None:
    """With checkpoint.best_on the best score is that benchmark's, whatever the overall one does."""

    def scored(overall: float, select: float) -> Evaluation:
        benchmarks = {"a": replace(EVALUATION, avg=overall), "s": replace(EVALUATION, avg=select)}
        return replace(EVALUATION, avg=overall, benchmarks=benchmarks)

    progress = Progress().evaluated(scored(0.9, 0.2), "s").evaluated(scored(0.1, 0.3), "s")
    assert progress.best == 0.3
    assert progress.evaluated(scored(0.95, 0.25), "s").best == 0.3
