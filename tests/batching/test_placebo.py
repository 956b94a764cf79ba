"""The placebo: FIPO's weights go to other tokens of the mini-batch, the same ones in every layout and packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.algorithm import permute_weights
from megatron_fipo.batch import Rollouts
from megatron_fipo.batching.placebo import with_placebo_weights
from tests.support.actors import actor_of, batch_of, gradients_of, in_order, per_micro_batch
from tests.support.policies import make_qwen2, make_rollouts
from tests.support.ranks import run_ranks

COUNT, SEED = 23, 5
LAYOUTS: dict[str, dict[str, int]] = {
    "dp2": {"data": 2},
    "tp2": {"tensor": 2},
    "pp2": {"pipeline": 2},
    "cp2": {"context": 2},
    "pp2_vpp2": {"pipeline": 2, "virtual_pipeline": 2},
    "small_micro_batches": {"budget": 80},
}
TOKENS = st.lists(st.tuples(st.floats(0.5, 2.0, width=32), st.sampled_from([-1.0, 0.0, 1.0])), max_size=40)


@given(TOKENS, st.integers(0, 2**63 - 1))
def test_weights_are_permuted_within_a_sign(tokens: list[tuple[float, float]], seed: int) -> None:
    """Each sign keeps its weights, as a multiset; tokens of neither sign keep their own; a seed says all."""
    weights, strata = torch.tensor(tokens).reshape(-1, 2).unbind(1)
    permuted = permute_weights(weights, strata, seed)
    for sign in (-1, 1):
        assert torch.equal(permuted[strata == sign].sort()[0], weights[strata == sign].sort()[0])
    assert torch.equal(permuted[strata == 0], weights[strata == 0])
    assert torch.equal(permute_weights(weights, strata, seed), permuted)


def test_permutation_is_random() -> None:
    """About one of a sign's 10,000 tokens keeps its weight; signs and seeds have unrelated permutations."""
    weights, strata = torch.arange(20_000.0), torch.ones(20_000)
    strata[::2] = -1
    permuted = permute_weights(weights, strata, SEED)
    assert ((permuted - weights) % 2 == 0).all()
    assert (permuted == weights).sum() < 12
    assert abs(torch.corrcoef(torch.stack([weights, permuted]))[0, 1]) < 0.03
    assert (permuted[::2] == permuted[1::2] - 1).sum() < 12
    assert (permute_weights(weights, strata, SEED + 1) == permuted).sum() < 12


def _rollouts() -> Rollouts:
    """Responses of both signs, and some whose group had nothing to learn from."""
    rollouts = make_rollouts(COUNT)
    advantages = rollouts.advantages.clone()
    advantages[::6] = 0.0
    return rollouts.replace(advantages=advantages, ids=rollouts.ids.flip(0) * 3)


def _update(path: Path, layout: dict[str, int], kind: str) -> dict[str, Any]:
    """One update whose old log-probabilities are the policy's own and noise, with jumps above the dual clip.

    `kind`: fipo; placebo; or identity, a placebo whose weights are FIPO's, in their places.
    """
    layout = dict(layout)
    budget, data = layout.pop("budget", 256), layout.pop("data", 1)
    world = data * layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1)
    sections: dict[str, Any] = {
        "parallel": {**layout, "world_size": world},
        "algorithm": {"influence": "fipo" if kind == "fipo" else "placebo"},
        "trainer": {"tokens_per_micro_batch": budget},
    }
    rollouts = _rollouts()
    generator = torch.Generator().manual_seed(3)
    noise = [0.3 * torch.randn(n, generator=generator) for n in rollouts.response_lengths.tolist()]
    for sequence in noise:
        sequence[torch.rand(len(sequence), generator=generator) < 0.02] = -3.0
    with actor_of(path, **sections) as actor:
        batch = batch_of(actor, rollouts)
        own = in_order(batch, actor.log_probs(batch))
        old = per_micro_batch(batch, [own[i] + noise[i] if i in own else noise[i] for i in range(COUNT)])
        batch = batch.with_token_values(old_log_probs=old)
        influence = actor.influence(batch)
        if kind == "identity":
            batch = batch.with_token_values(influence_weights=[weights for weights, _ in influence])
        if kind == "placebo":
            batch = with_placebo_weights(batch, influence, rollouts, SEED, actor.topology)
        with actor.training(), actor.training_step():
            loss, metrics = actor.get_loss_and_metrics(batch, forward_only=False)
            gradients = gradients_of(actor)
            values = actor.token_values(batch)
        return {
            "loss": loss,
            "metrics": metrics,
            "gradients": gradients,
            "fipo": in_order(batch, [weights for weights, _ in influence]),
            "strata": in_order(batch, [strata for _, strata in influence]),
            "future_kl": in_order(batch, [v[1] for v in values]),
            "used": in_order(batch, [v[2] for v in values]),
        }


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def fipo(path: Path) -> dict[str, Any]:
    return run_ranks(_update, 1, path, {}, "fipo")[0]


@pytest.fixture(scope="module")
def placebo(path: Path) -> dict[str, Any]:
    return run_ranks(_update, 1, path, {}, "placebo")[0]


def _all(result: dict[str, Any], name: str) -> torch.Tensor:
    return torch.cat([result[name][i] for i in range(COUNT)])


def _masks(rollouts: Rollouts) -> list[torch.Tensor]:
    masks = rollouts.loss_mask.split(rollouts.lengths.tolist())
    return [mask[prompt:] for mask, prompt in zip(masks, rollouts.prompt_lengths.tolist(), strict=True)]


@pytest.mark.distributed
def test_influence_is_the_update_s_own(fipo: dict[str, Any]) -> None:
    """The forward pass before an update gives the weights that the update then uses, to the bit."""
    assert torch.equal(_all(fipo, "fipo"), _all(fipo, "used"))
    assert 0.1 < (_all(fipo, "fipo") > 1.001).float().mean() < 0.9


@pytest.mark.distributed
def test_strata_are_the_loss_s_tokens(fipo: dict[str, Any]) -> None:
    """The sign of the advantage where a token is in the loss; 0 in holes and in vetoed responses."""
    rollouts, vetoed = _rollouts(), []
    for i, mask in enumerate(_masks(rollouts)):
        strata, sign = fipo["strata"][i], rollouts.advantages[i].sign()
        if sign != 0 and (strata == 0).all() and mask.any():
            vetoed.append(i)
        else:
            assert torch.equal(strata, torch.where(mask, sign, 0.0)), i
    counted = sum(mask.any().item() for mask in _masks(rollouts))
    assert len(vetoed) / counted == pytest.approx(fipo["metrics"]["vetoed_fraction"])
    assert len(vetoed) > 0


@pytest.mark.distributed
def test_placebo_keeps_the_weights_of_each_sign(placebo: dict[str, Any]) -> None:
    """The multiset of each sign is FIPO's, most tokens have another's weight, and tokens outside the loss their own."""
    weights, used, strata = _all(placebo, "fipo"), _all(placebo, "used"), _all(placebo, "strata")
    for sign in (-1, 1):
        of_sign = strata == sign
        assert of_sign.sum() > 100
        assert torch.equal(used[of_sign].sort()[0], weights[of_sign].sort()[0])
        unequal = weights[of_sign] != weights[of_sign].median()
        assert (used[of_sign] != weights[of_sign])[unequal].float().mean() > 0.5
    assert torch.equal(used[strata == 0], weights[strata == 0])
    assert (_rollouts().advantages == 0).sum() == 4


@pytest.mark.distributed
def test_placebo_moves_weights_between_responses(placebo: dict[str, Any]) -> None:
    """It permutes over the mini-batch, not within a response: a response's mean weight is no longer its own."""
    own = torch.stack([placebo["fipo"][i].mean() for i in range(COUNT)])
    used = torch.stack([placebo["used"][i].mean() for i in range(COUNT)])
    assert (own - used).abs().max() > 0.01


@pytest.mark.distributed
def test_placebo_changes_the_loss_alone(fipo: dict[str, Any], placebo: dict[str, Any]) -> None:
    """Future-KL and every metric but the loss are FIPO's own; loss and gradient are not."""
    assert torch.equal(_all(placebo, "future_kl"), _all(fipo, "future_kl"))
    differing = {name for name, value in placebo["metrics"].items() if fipo["metrics"][name] != value}
    assert placebo["metrics"].keys() == fipo["metrics"].keys()
    assert differing == {"loss"}
    assert max((placebo["gradients"][n] - g).norm() / g.norm() for n, g in fipo["gradients"].items()) > 1e-2


@pytest.mark.distributed
def test_fipos_weights_in_their_places_are_fipo(path: Path, fipo: dict[str, Any]) -> None:
    """With each token's own weight the placebo's loss and gradients are FIPO's (relative error 2e-6)."""
    identity = run_ranks(_update, 1, path, {}, "identity")[0]
    assert identity["loss"] == pytest.approx(fipo["loss"], rel=1e-6)
    for name, gradient in fipo["gradients"].items():
        assert (identity["gradients"][name] - gradient).norm() <= 2e-6 * gradient.norm(), name


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_same_placebo(name: str, path: Path, placebo: dict[str, Any]) -> None:
    """A token gets the weight of the same other token: used weights to rounding, and with them loss and gradients."""
    layout = LAYOUTS[name]
    world = layout.get("data", 1) * layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1)
    results = run_ranks(_update, world, path, layout, "placebo")
    assert {i for result in results for i in result["used"]} == set(range(COUNT))
    for result in results:
        assert result["loss"] == pytest.approx(placebo["loss"], rel=1e-5)
        for i, used in result["used"].items():
            assert torch.equal(result["strata"][i], placebo["strata"][i])
            torch.testing.assert_close(used, placebo["used"][i], rtol=0, atol=2e-4)
        for parameter, gradient in placebo["gradients"].items():
            assert (result["gradients"][parameter] - gradient).norm() <= 2e-5 * gradient.norm(), parameter


def _update_without_weights(path: Path) -> str:
    with actor_of(path, algorithm={"influence": "placebo"}) as actor:
        batch = batch_of(actor, _rollouts())
        batch = batch.with_token_values(old_log_probs=actor.log_probs(batch))
        with pytest.raises(ValueError, match="influence weights") as error:
            actor.get_loss_and_metrics(batch, forward_only=False)
        return str(error.value)


@pytest.mark.distributed
def test_placebo_never_falls_back_to_fipo(path: Path) -> None:
    """A micro-batch without permuted weights is an error."""
    (message,) = run_ranks(_update_without_weights, 1, path)
    assert message == "algorithm.influence=placebo requires a micro-batch with permuted influence weights"
