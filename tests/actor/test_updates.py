"""One optimizer update: the gradient of every term of the loss, Adam's, the schedule, and what is skipped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.actor import FIPOActor, GradientError, UpdateStatistics
from megatron_fipo.algorithm import FIPOLossConfig, fipo_loss
from megatron_fipo.batch import Rollouts, TrainBatch
from megatron_fipo.parallel import device
from tests.actor import references
from tests.support.actors import actor_of, batch_of, gradients_of, in_order, per_micro_batch, weights_of
from tests.support.policies import make_qwen2, make_rollouts
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

Tensors = dict[str, torch.Tensor]
ADAM = {"lr": 5e-3, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.3, "grad_clip": 0.05}
ENTROPY, KL = 0.05, 0.5
COUNT = 8


def _rollouts() -> Rollouts:
    return make_rollouts(COUNT)


def _noise(scale: float, seed: int) -> list[torch.Tensor]:
    """One tensor of independent normal numbers a sequence."""
    generator = torch.Generator().manual_seed(seed)
    lengths = _rollouts().response_lengths.tolist()
    return [scale * torch.randn(n, generator=generator) for n in lengths]


def _batch(actor: FIPOActor, shift: float = 0.1, rollouts: Rollouts | None = None) -> TrainBatch:
    """A mini-batch whose old log-probabilities are the policy's own, moved by noise."""
    batch = batch_of(actor, rollouts or _rollouts())
    own, noise = actor.log_probs(batch), per_micro_batch(batch, _noise(shift, seed=1))
    return batch.with_token_values(old_log_probs=[x - n for x, n in zip(own, noise, strict=True)])


def _old(batch: TrainBatch) -> list[torch.Tensor]:
    sequences = in_order(batch, [m.old_log_probs for m in batch.micro_batches])
    return [sequences[i] for i in range(COUNT)]


def _gradient(actor: FIPOActor, batch: TrainBatch) -> Tensors:
    actor.prepare_for_training_step()
    actor.get_loss_and_metrics(batch, forward_only=False)
    return gradients_of(actor)


def _update(actor: FIPOActor, batch: TrainBatch) -> UpdateStatistics:
    with actor.training_step():
        actor.get_loss_and_metrics(batch, forward_only=False)
    assert actor.last_update is not None
    return actor.last_update


# What runs inside a rank


def _terms(path: Path, parallel: dict[str, int]) -> dict[str, Any]:
    """Gradients with an entropy bonus, with token weights and with a KL penalty."""
    seen: dict[str, Any] = {}
    with actor_of(path, parallel=parallel) as actor:
        batch = _batch(actor)
        seen["old"] = _old(batch)
        seen["plain"] = _gradient(actor, batch)
        weights = per_micro_batch(batch, [n.exp() for n in _noise(0.5, seed=2)])
        seen["weighted"] = _gradient(actor, batch.with_token_values(token_weights=weights))
    with actor_of(path, parallel=parallel, algorithm={"entropy_coefficient": ENTROPY}) as actor:
        seen["entropy"] = _gradient(actor, _batch(actor))
    with actor_of(path, parallel=parallel, algorithm={"kl_coefficient": KL}) as actor:
        batch = _batch(actor)
        own = actor.log_probs(batch)
        reference = actor.get_init_policy_logprobs([batch])[0]
        batch = batch.with_token_values(reference_log_probs=reference)
        seen["reference_is_own"] = all(torch.equal(a, b) for a, b in zip(own, reference, strict=True))
        seen["kl_at_start"] = _gradient(actor, batch)
        with actor.training():
            _update(actor, batch)
        again = actor.get_init_policy_logprobs([batch])[0]
        seen["reference_stays"] = all(torch.equal(a, b) for a, b in zip(again, reference, strict=True))
        seen["moved"] = weights_of(actor)
        seen["kl_later"] = _gradient(actor, batch)
    return seen


def _plain(path: Path) -> dict[str, Any]:
    """Gradients of two micro-batches and more, whose LM head adds to the buffer that the embedding adds to."""
    with actor_of(path) as actor:
        batch = _batch(actor)
        return {"old": _old(batch), "gradient": _gradient(actor, batch), "micro_batches": len(batch.micro_batches)}


def _adam(path: Path) -> dict[str, Any]:
    with actor_of(path, optimizer=ADAM) as actor:
        batch = _batch(actor)
        with actor.training():
            norms = [_update(actor, batch).grad_norm for _ in range(3)]
        return {"old": _old(batch), "norms": norms, "weights": weights_of(actor)}


def _variant(path: Path, *, steps: int = 2, **sections: dict[str, Any]) -> dict[str, Any]:
    """The first gradient of a run of `steps` steps of two updates, and what each update said."""
    with actor_of(path, **sections) as actor:
        batch = _batch(actor)
        before, updates = weights_of(actor), []
        first = _gradient(actor, batch)
        for _ in range(steps):
            with actor.training():
                updates += [_update(actor, batch), _update(actor, batch)]
            with actor.inference():
                pass
        counts = len(batch.micro_batches)
        weights = weights_of(actor)
    return {"before": before, "gradient": first, "updates": updates, "weights": weights, "micro_batches": counts}


def _skips(path: Path, distributed: bool) -> dict[str, Any]:
    """Bad, good, then bad updates until the actor gives up."""
    with actor_of(path, optimizer={"max_consecutive_skips": 2, "distributed": distributed}) as actor:
        good, rollouts = _batch(actor), _rollouts()
        bad = _batch(actor, rollouts=rollouts.replace(advantages=rollouts.advantages.clone().fill_(torch.nan)))
        before = weights_of(actor)
        with actor.training():
            first = _update(actor, bad)
        after_bad = weights_of(actor)
        with actor.training():
            second = _update(actor, good)
        after_good = weights_of(actor)
        with actor.training():
            _update(actor, bad)
        with pytest.raises(GradientError, match=r"2 updates in a row.*the last one was nan"), actor.training():
            _update(actor, bad)
        weights = [before, after_bad, after_good, weights_of(actor)]
    with actor_of(path, optimizer={"distributed": distributed}) as actor, actor.training():
        expected = _update(actor, _batch(actor))
        weights.append(weights_of(actor))
    return {"updates": [first, second, expected], "weights": weights}


def _deterministic(path: Path) -> dict[str, Any]:
    """Run `_variant` with everything that run.deterministic switches on in a rank."""
    device.set_up(None, deterministic=True)
    try:
        return _variant(path, run={"deterministic": True})
    finally:
        device.set_up(None)


def _all_on_one_rank(path: Path) -> dict[str, Any]:
    return {
        "terms": _terms(path, {}),
        "adam": _adam(path),
        "plain": _variant(path),
        "deterministic": _deterministic(path),
        "offloaded": _variant(path, optimizer={"offload_state": True}),
        "small_budget": _variant(path, trainer={"tokens_per_micro_batch": 80}),
        "spikes": _variant(path, steps=1, optimizer={"spike_threshold": 1e-3, "max_consecutive_skips": 3}),
        "below_spikes": _variant(path, optimizer={"spike_threshold": 1e6}),
        "warmup_by_step": _variant(path, steps=4, optimizer={"warmup": 2, "warmup_unit": "step"}),
        "warmup_by_update": _variant(path, optimizer={"warmup": 2, "warmup_unit": "update"}),
        "skips": _skips(path, distributed=False),
        "skips_distributed": _skips(path, distributed=True),
    }


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("qwen2"), layers=2)


@pytest.fixture(scope="module")
def seen(path: Path) -> dict[str, Any]:
    return run_ranks(_all_on_one_rank, 1, path)[0]


@pytest.fixture(scope="module", params=["one", "tp2_cp2"])
def terms(request: pytest.FixtureRequest, path: Path) -> dict[str, Any]:
    """Gradients of each term, on one rank and where vocabulary and sequences are split."""
    if request.param == "one":
        return request.getfixturevalue("seen")["terms"]
    return run_ranks(_terms, 4, path, {"tensor": 2, "context": 2, "world_size": 4})[0]


# The reference: transformers and torch's autograd in this process


def _reference_gradient(
    path: Path,
    old: Sequence[torch.Tensor],
    *,
    weights: Tensors | None = None,
    token_weights: torch.Tensor | None = None,
    entropy_coefficient: float = 0.0,
    reference: torch.Tensor | None = None,
) -> Tensors:
    """Gradient of the mean FIPO loss of all tokens, and of the further terms by their definition."""
    model = references.load(path)
    if weights is not None:
        model.load_state_dict(weights)
    return references.gradients(model, _rollouts(), _objective(old, token_weights, entropy_coefficient, reference))


def _objective(
    old: Sequence[torch.Tensor],
    token_weights: torch.Tensor | None = None,
    entropy_coefficient: float = 0.0,
    reference: torch.Tensor | None = None,
) -> Any:
    rollouts = _rollouts()
    masks = rollouts.loss_mask.split(rollouts.lengths.tolist())
    mask = torch.cat([m[p:] for m, p in zip(masks, rollouts.prompt_lengths.tolist(), strict=True)])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), rollouts.response_lengths.cumsum(0)])

    def loss(log_probs: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
        out = fipo_loss(
            log_probs, torch.cat(list(old)), rollouts.advantages, mask, offsets, FIPOLossConfig(), token_weights
        )
        assert not out.vetoed.any()
        total = out.loss_sum / mask.sum() - entropy_coefficient * entropies[mask].mean()
        if reference is not None:
            ratio = (reference - log_probs)[mask]
            total = total + KL * (ratio.exp() - ratio - 1).mean()
        return total

    return loss


def _assert_equal(actual: Tensors, expected: Tensors, error: float) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= error * gradient.norm(), name


def _distance(a: Tensors, b: Tensors) -> float:
    return float(sum((a[n] - b[n]).norm() ** 2 for n in b) ** 0.5 / sum(x.norm() ** 2 for x in b.values()) ** 0.5)


def _same(a: Tensors, b: Tensors) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def test_gradient_equals_autograd(path: Path, terms: dict[str, Any]) -> None:
    """The gradient of every weight is autograd's through transformers and `fipo_loss` (relative error 1e-4)."""
    _assert_equal(terms["plain"], _reference_gradient(path, terms["old"]), 1e-4)


def test_gradient_of_a_shared_weight_equals_autograd(tmp_path: Path) -> None:
    """Where embedding and LM head are one weight, it has both parts of its gradient (relative error 1e-4)."""
    path = make_qwen2(tmp_path, layers=2, tied=True)
    seen = run_ranks(_plain, 1, path)[0]
    assert seen["micro_batches"] > 1
    _assert_equal(seen["gradient"], _reference_gradient(path, seen["old"]), 1e-4)


def test_entropy_bonus(path: Path, terms: dict[str, Any]) -> None:
    """entropy_coefficient subtracts that many times the mean entropy of trained tokens from the loss."""
    expected = _reference_gradient(path, terms["old"], entropy_coefficient=ENTROPY)
    _assert_equal(terms["entropy"], expected, 1e-4)
    assert _distance(terms["entropy"], terms["plain"]) > 0.01


def test_token_weights_reach_the_loss(path: Path, terms: dict[str, Any]) -> None:
    """token_weights multiply each token's own loss."""
    weights = torch.cat([n.exp() for n in _noise(0.5, seed=2)])
    _assert_equal(terms["weighted"], _reference_gradient(path, terms["old"], token_weights=weights), 1e-4)
    assert _distance(terms["weighted"], terms["plain"]) > 0.01


def test_reference_is_the_policy_at_the_start(terms: dict[str, Any]) -> None:
    """Reference log-probabilities are the policy's own at the start, bit for bit, and stay what they were."""
    assert terms["reference_is_own"]
    assert terms["reference_stays"]


def test_kl_penalty_has_no_gradient_at_the_start(terms: dict[str, Any]) -> None:
    """k3 is flat where policy and reference are equal."""
    assert _distance(terms["kl_at_start"], terms["plain"]) < 1e-6


def test_kl_penalty_after_an_update(path: Path, terms: dict[str, Any]) -> None:
    """Once the policy has moved, the gradient is autograd's with k3, which is not the one without."""
    with torch.no_grad():
        reference = torch.cat(references.token_statistics(references.load(path), _rollouts())[0])
    moved = terms["moved"]
    expected = _reference_gradient(path, terms["old"], weights=moved, reference=reference)
    _assert_equal(terms["kl_later"], expected, 1e-3)  # k3's is a difference of nearly equal log-probabilities
    assert _distance(expected, _reference_gradient(path, terms["old"], weights=moved)) > 0.01


def test_three_updates_equal_torch_adamw(path: Path, seen: dict[str, Any]) -> None:
    """lr, betas, eps, decay (of matrices only) and clipping reach Adam: three updates of torch's own agree."""
    model = references.load(path)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=ADAM["lr"],
        betas=ADAM["betas"],
        eps=ADAM["eps"],
        weight_decay=ADAM["weight_decay"],
    )
    objective = _objective(seen["adam"]["old"])
    for norm in seen["adam"]["norms"]:
        references.gradients(model, _rollouts(), objective)
        assert norm == pytest.approx(
            float(torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM["grad_clip"])), rel=1e-4
        )
        assert norm > ADAM["grad_clip"]
        adamw.step()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(
            seen["adam"]["weights"][name], weight, rtol=0, atol=2e-5, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("name", ["skips", "skips_distributed"])
def test_non_finite_gradient_is_skipped(name: str, seen: dict[str, Any]) -> None:
    """A NaN gradient leaves weights and Adam's state alone, a good one resets the count, two in a row are an error."""
    first, second, expected = seen[name]["updates"]
    before, after_bad, after_good, after_error, plain = seen[name]["weights"]
    assert first.skipped
    assert first.grad_norm != first.grad_norm
    assert not second.skipped
    assert second == expected
    assert _same(after_bad, before)
    assert not _same(after_good, before)
    assert _same(after_good, plain)
    assert _same(after_error, after_good)


def test_spikes_are_skipped(seen: dict[str, Any]) -> None:
    """Updates with a norm above spike_threshold are skipped, with their norm reported; those below are not touched."""
    spikes = seen["spikes"]
    assert [u.skipped for u in spikes["updates"]] == [True, True]
    assert all(u.grad_norm > 1e-3 for u in spikes["updates"])
    assert _same(spikes["weights"], spikes["before"])
    assert _same(seen["below_spikes"]["weights"], seen["plain"]["weights"])


def test_warm_up_by_step(seen: dict[str, Any]) -> None:
    """Linear from 0 over `warmup` steps, both updates of a step alike, then constant."""
    rates = [u.lr for u in seen["warmup_by_step"]["updates"]]
    assert rates == [0.0, 0.0, 5e-4, 5e-4, 1e-3, 1e-3, 1e-3, 1e-3]


def test_warm_up_by_update(seen: dict[str, Any]) -> None:
    """Linear from 0 over `warmup` updates, then constant."""
    assert [u.lr for u in seen["warmup_by_update"]["updates"]] == [0.0, 5e-4, 1e-3, 1e-3]


def test_no_warm_up(seen: dict[str, Any]) -> None:
    """warmup 0 trains at the full rate from the first update."""
    assert [u.lr for u in seen["plain"]["updates"]] == [1e-3] * 4


def test_offloading_changes_nothing(seen: dict[str, Any]) -> None:
    """offload_state gives the same bits after two steps with inference between them."""
    assert _same(seen["offloaded"]["weights"], seen["plain"]["weights"])
    assert seen["offloaded"]["updates"] == seen["plain"]["updates"]


def test_deterministic_changes_nothing_on_the_cpu(seen: dict[str, Any]) -> None:
    """run.deterministic is accepted there, and gives the same bits."""
    assert _same(seen["deterministic"]["weights"], seen["plain"]["weights"])
    assert seen["deterministic"]["updates"] == seen["plain"]["updates"]


def test_micro_batching_changes_nothing(seen: dict[str, Any]) -> None:
    """A smaller token budget makes more micro-batches and the same gradient (relative error 1e-6)."""
    small, plain = seen["small_budget"], seen["plain"]
    assert small["micro_batches"] > plain["micro_batches"]
    for name, gradient in plain["gradient"].items():
        assert (small["gradient"][name] - gradient).norm() <= 2e-6 * gradient.norm(), name
    assert small["updates"][0].grad_norm == pytest.approx(plain["updates"][0].grad_norm, rel=1e-6)
