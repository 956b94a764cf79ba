"""More tensor-parallel ranks than key/value heads: what they compute and export is what one process does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.test_layouts import Reference, _assert_same, _train
from tests.support.families import make_checkpoint
from tests.support.policies import make_rollouts
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

# Two query heads for each of two key/value heads, with and without norms of queries and keys; and one for all four.
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "two_ranks_a_head": ("qwen2", {"tensor": 4}),
    "norms": ("qwen3", {"tensor": 4}),
    "norms_sp": ("qwen3", {"tensor": 4, "sequence": True}),
    "one_head": ("qwen2_one_kv_head", {"tensor": 2}),
    "one_head_sp": ("qwen2_one_kv_head", {"tensor": 4, "sequence": True}),
    "one_head_cp2": ("qwen2_one_kv_head", {"tensor": 2, "context": 2}),
    "one_head_pp2_vpp2": ("qwen2_one_kv_head", {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2}),
    "one_head_distributed_optimizer": ("qwen2_one_kv_head", {"tensor": 2, "data": 2, "distributed": True}),
    "one_head_recompute": ("qwen2_one_kv_head", {"tensor": 2, "recompute": "full"}),
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """(checkpoint, rollouts, what one process makes of them) of a family."""

    @functools.cache
    def run(family: str) -> Reference:
        path = make_checkpoint(tmp_path_factory.mktemp("model") / family, family)
        rollouts = make_rollouts(11, vocab=60)
        return path, rollouts, run_ranks(_train, 1, path, {}, rollouts, None)[0]

    return run


EVERY_DAY = ("two_ranks_a_head", "one_head_sp", "one_head_pp2_vpp2")  # the others take as long, and differ by one part


@pytest.mark.parametrize(
    "name", [name if name in EVERY_DAY else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_equals_one_process(name: str, reference: Callable[[str], Reference]) -> None:
    """Loss, every gradient (relative error 2e-5), metrics, gradient norm and the weights after two updates; each
    key/value head is exported once, with the gradient that all of its ranks add up."""
    family, layout = LAYOUTS[name]
    path, rollouts, expected = reference(family)
    world = layout.get("data", 1) * layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1)
    for result in run_ranks(_train, world, path, layout, rollouts, expected["old"]):
        assert result["weights"].keys() == expected["weights"].keys()
        _assert_same(result, expected)
