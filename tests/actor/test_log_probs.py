"""The actor's log-probabilities and entropies are those of `transformers`, for every packing and layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.actor import references
from tests.support.actors import actor_of, batch_of, in_order, weights_of
from tests.support.policies import make_qwen2, make_rollouts
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

# Twice the positions, by linear interpolation: every angle is halved.
EXTENDED = {
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
}
ONE_RANK: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True},
    "untied_cool": {"rollout": {"temperature": 0.7}},
    "tied_cool": {"tied": True, "rollout": {"temperature": 0.7}},
    "extended": {"model": {"overrides": EXTENDED}},
    "bf16": {"model": {"dtype": "bfloat16"}},
    "bf16_fp32_logits": {"model": {"dtype": "bfloat16", "fp32_logits": True}},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2": {"pipeline": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "dp2": {},
    "tp2": {"tensor": 2},
}
LONGEST = 60
Result = dict[str, dict[str, Any]]


def _one_rank(paths: dict[bool, Path]) -> Result:
    """Log-probabilities by sequence and the mean entropy, for each case of `ONE_RANK`."""
    results = {}
    for name, case in ONE_RANK.items():
        sections = dict(case)
        with actor_of(paths[sections.pop("tied", False)], **sections) as actor:
            batch = batch_of(actor, make_rollouts(9, longest=LONGEST))
            log_probs = actor.log_probs(batch)
            batch = batch.with_token_values(old_log_probs=log_probs)
            _, metrics = actor.get_loss_and_metrics(batch, forward_only=True)
        results[name] = {"log_probs": in_order(batch, log_probs), **metrics}
    return results


def _two_ranks(path: Path, tokens: torch.Tensor) -> dict[str, Any]:
    """`get_inference_log_probs` of whole rows on each layout, and one update in both precisions at TP 2."""
    results: dict[str, Any] = {}
    for name, layout in LAYOUTS.items():
        with actor_of(path, parallel={**layout, "world_size": 2}) as actor:
            results[name] = actor.get_inference_log_probs(tokens)
            results[f"{name}_by_two"] = actor.get_inference_log_probs(tokens, forward_micro_batch_size=2)
    for dtype in ("float32", "bfloat16"):
        parallel, model = {"tensor": 2, "world_size": 2}, {"dtype": dtype}
        with actor_of(path, parallel=parallel, model=model) as actor:
            batch = batch_of(actor, make_rollouts(9, longest=LONGEST))
            batch = batch.with_token_values(old_log_probs=[x - 0.1 for x in actor.log_probs(batch)])
            before = weights_of(actor)
            with actor.training(), actor.training_step():
                loss, metrics = actor.get_loss_and_metrics(batch, forward_only=False)
            after = weights_of(actor)
            moved = {n: float((after[n].float() - w.float()).abs().max()) for n, w in before.items()}
            dtypes = {str(w.dtype) for w in after.values()}
            results[dtype] = {"loss": loss, "moved": moved, "dtypes": dtypes, "update": actor.last_update, **metrics}
    return results


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    return {tied: make_qwen2(tmp_path_factory.mktemp("qwen2"), tied=tied) for tied in (False, True)}


@pytest.fixture(scope="module")
def actual(paths: dict[bool, Path]) -> Result:
    return run_ranks(_one_rank, 1, paths)[0]


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 250, (5, 23), generator=torch.Generator().manual_seed(3))  # [B, S]


@pytest.fixture(scope="module")
def on_two_ranks(paths: dict[bool, Path], tokens: torch.Tensor) -> list[dict[str, Any]]:
    return run_ranks(_two_ranks, 2, paths[False], tokens)


@torch.no_grad()
def _expected(paths: dict[bool, Path], name: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    case = ONE_RANK[name]
    model = references.load(paths[case.get("tied", False)], case.get("model", {}).get("overrides"))
    temperature = case.get("rollout", {}).get("temperature", 1.0)
    return references.token_statistics(model, make_rollouts(9, longest=LONGEST), temperature)


@pytest.mark.parametrize("name", [n for n in ONE_RANK if "bf16" not in n])
def test_log_probs_equal_transformers(name: str, paths: dict[bool, Path], actual: Result) -> None:
    """Packed sequences of different lengths give transformers' log-probabilities of each alone, to 1e-4 nats."""
    expected, _ = _expected(paths, name)
    assert sorted(actual[name]["log_probs"]) == list(range(len(expected)))
    for i, log_probs in enumerate(expected):
        torch.testing.assert_close(actual[name]["log_probs"][i], log_probs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [n for n in ONE_RANK if "bf16" not in n])
def test_entropy_equals_transformers(name: str, paths: dict[bool, Path], actual: Result) -> None:
    """The mean entropy over trained tokens, at the sampling temperature, is transformers'."""
    _, entropies = _expected(paths, name)
    rollouts = make_rollouts(9, longest=LONGEST)
    masks = rollouts.loss_mask.split(rollouts.lengths.tolist())
    trained = torch.cat([m[p:] for m, p in zip(masks, rollouts.prompt_lengths.tolist(), strict=True)])
    assert actual[name]["entropy"] == pytest.approx(float(torch.cat(entropies)[trained].mean()), abs=1e-4)


def test_temperature_and_rope_change_log_probs(actual: Result) -> None:
    """The cases above differ from each other, so that their agreement with transformers says something."""
    plain = torch.cat(list(actual["untied"]["log_probs"].values()))
    for name in ("untied_cool", "extended", "tied"):
        other = torch.cat(list(actual[name]["log_probs"].values()))
        assert (other - plain).abs().mean() > 0.1, name


def test_bf16_is_near_float32(actual: Result) -> None:
    """bfloat16 log-probabilities scatter around float32's, and float32 logits scatter less than bfloat16 ones."""
    exact = actual["untied"]["log_probs"]
    errors = {}
    for name in ("bf16", "bf16_fp32_logits"):
        log_probs = actual[name]["log_probs"]
        assert all(x.dtype == torch.float32 for x in log_probs.values())
        errors[name] = float(torch.cat([log_probs[i] - exact[i] for i in exact]).abs().mean())
    assert 0 < errors["bf16_fp32_logits"] < errors["bf16"] < 0.1


@pytest.mark.parametrize("name", LAYOUTS)
def test_inference_log_probs_on_every_rank(
    name: str, paths: dict[bool, Path], tokens: torch.Tensor, on_two_ranks: list[dict[str, Any]]
) -> None:
    """[B, S] tokens give transformers' [B, S - 1] log-probabilities on every stage, whatever the micro-batch size."""
    with torch.no_grad():
        log_p = references.load(paths[False])(input_ids=tokens[:, :-1]).logits.log_softmax(-1)
    expected = log_p.gather(2, tokens[:, 1:, None]).squeeze(2)
    for result in on_two_ranks:
        for log_probs in (result[name], result[f"{name}_by_two"]):
            assert log_probs.shape == (5, 22)
            torch.testing.assert_close(log_probs, expected, rtol=0, atol=1e-4)


def test_bf16_update_at_tp2(on_two_ranks: list[dict[str, Any]]) -> None:
    """A bfloat16 policy takes an update at TP 2: its loss is near float32's and every weight matrix moves."""
    for result in on_two_ranks:
        exact, rough = result["float32"], result["bfloat16"]
        assert rough["dtypes"] == {"torch.bfloat16"}
        assert rough["loss"] == pytest.approx(exact["loss"], abs=0.02)
        assert rough["update"].grad_norm == pytest.approx(exact["update"].grad_norm, rel=0.1)
        assert not rough["update"].skipped
        assert all(change > 0 for name, change in rough["moved"].items() if "proj.weight" in name)
