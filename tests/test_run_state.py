"""The score by which a run's best checkpoint is kept."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fipo.resume import Progress
from megatron_fipo.run_state import RunState
from tests.support.policies import make_config


@pytest.mark.parametrize(("best_on", "expected"), [(None, 0.5), ("select", 0.25)])
def test_score_of_a_checkpoint(best_on: str | None, expected: float) -> None:
    """It is the overall avg@k, or with checkpoint.best_on that of the benchmark that selects."""
    saved: list[float | None] = []
    config = make_config("unused", checkpoint={"every": 1, "best_on": best_on})
    batches: Any = SimpleNamespace(state_dict=dict, kept_rollouts=dict, drain=lambda: None)
    log: Any = SimpleNamespace(step=lambda step, metrics: None, seconds=0.0)
    topology: Any = None
    state = RunState(config, topology, topology, batches, log)
    state.checkpointer = SimpleNamespace(  # type: ignore[assignment]
        poll=lambda: None,
        in_progress=False,
        whole=None,
        save=lambda step, content, kept, score, wait: saved.append(score),
    )
    scores = {"eval/avg@k": 0.5, "eval/select/avg@k": 0.25, "eval/aime24/avg@k": 0.75}
    state.record(Progress(step=1, unlogged={"policy/loss": 1.0}), scores)
    state.record(Progress(step=2, unlogged={"policy/loss": 1.0}), {})
    assert saved == [expected, None]
