"""Sequence chunks compute what one process computes without them: loss, gradients, metrics, weights after two updates.

The mini-batch is that of `test_layouts`: packed sequences of very different lengths, so that chunks begin inside
sequences and at their ends, and a policy moved away, so that clips, veto and influence weights act.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.batch import Rollouts
from megatron_fipo.model.check import check_model
from tests.distributed.test_layouts import _assert_same, _train
from tests.support.families import make_checkpoint
from tests.support.policies import make_config, make_qwen2, make_rollouts
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {"sequence_chunks": 3},
    "pp2": {"sequence_chunks": 2, "pipeline": 2},
    "tp2_sp": {"sequence_chunks": 3, "tensor": 2, "sequence": True},
    "tp2_pp2": {"sequence_chunks": 3, "tensor": 2, "pipeline": 2},
    "pp4": {"sequence_chunks": 8, "pipeline": 4},
    "dp2_pp2_distributed_optimizer": {"sequence_chunks": 2, "data": 2, "pipeline": 2, "distributed": True},
    "tp2_pp2_sp_tied": {"sequence_chunks": 3, "tensor": 2, "pipeline": 2, "sequence": True, "tied": True},
    "uneven_stages": {"sequence_chunks": 3, "pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 3},
    "head_alone": {"sequence_chunks": 3, "pipeline": 4, "pipeline_layout": "E|t|t*3|L"},
    "full_recompute": {"sequence_chunks": 3, "pipeline": 2, "recompute": "full"},
    "selective_recompute": {"sequence_chunks": 2, "pipeline": 2, "recompute": "selective"},
    "more_chunks_than_tokens": {"sequence_chunks": 100, "pipeline": 2},
    "data_parallel_padding": {"sequence_chunks": 3, "data": 2, "pipeline": 2, "sequences": 1},
}
WITHOUT_SEQUENCE_PARALLELISM, WITH_IT = [(1, 2), (2, 1), (2, 2), (4, 1)], [(1, 2), (2, 2)]  # PP, TP
PRODUCT = [
    {"sequence_chunks": n, "pipeline": p, "tensor": t, "sequence": s}
    for n in (2, 3, 8)
    for s, sizes in ((False, WITHOUT_SEQUENCE_PARALLELISM), (True, WITH_IT))
    for p, t in sizes
]

Reference = tuple[Path, Rollouts, dict[str, Any]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, int], Reference]:
    """(checkpoint, rollouts, what one process makes of them without chunks), tied or not, of a number of sequences."""

    @functools.cache
    def run(tied: bool, sequences: int) -> Reference:
        path, rollouts = make_qwen2(tmp_path_factory.mktemp("qwen2"), tied=tied), make_rollouts(sequences)
        return path, rollouts, run_ranks(_train, 1, path, {}, rollouts, None)[0]

    return run


def _check(layout: dict[str, Any], reference: Callable[[bool, int], Reference]) -> None:
    path, rollouts, expected = reference(layout.get("tied", False), layout.get("sequences", 23))
    world = layout.get("data", 1) * layout.get("tensor", 1) * layout.get("pipeline", 1)
    for result in run_ranks(_train, world, path, layout, rollouts, expected["old"]):
        _assert_same(result, expected)


@pytest.mark.parametrize("name", LAYOUTS)
def test_chunks_change_nothing(name: str, reference: Callable[[bool, int], Reference]) -> None:
    """Loss, every gradient (relative error 2e-5), metrics, gradient norm and the weights after two updates; the first
    log-ratio is exactly 0."""
    _check(LAYOUTS[name], reference)


@pytest.mark.slow  # 18 worlds of up to four ranks
@pytest.mark.parametrize("layout", PRODUCT, ids=str)
def test_every_combination(layout: dict[str, Any], reference: Callable[[bool, int], Reference]) -> None:
    """The same for 2, 3 and 8 chunks, PP 1, 2 and 4, TP 1 and 2, with and without sequence parallelism."""
    _check(layout, reference)


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    """Before ranks start."""
    path = make_checkpoint(tmp_path, "qwen3_moe")
    config = make_config(path, parallel={"sequence_chunks": 2})
    with pytest.raises(ValueError, match="sequence_chunks 2 is for models without experts: set it to 1 for"):
        check_model(config)
