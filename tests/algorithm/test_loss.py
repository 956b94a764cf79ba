"""The FIPO and DAPO/GRPO losses against their definition written out token by token, and their invariances."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.algorithm import FIPOLossConfig, finalize, fipo_loss, grpo_loss, merge
from megatron_fipo.config.loss import AGGREGATIONS
from tests.support.packed_batch import PackedBatch, random_batch

LENGTHS = [17, 1, 40, 0, 9, 33, 5, 26]
CONFIG = FIPOLossConfig(influence_clip=(0.8, 1.2), safety_threshold=3.0, half_life=8.0, dual_clip=4.0)


def written_out(batch, config, token_weights=None):
    """The specification, sequence by sequence and token by token: loss terms per aggregation, tokens, sequences."""
    terms, num_tokens = [], 0
    for i in range(len(batch.lengths)):
        one = batch.sequences([i])
        weights = torch.ones(one.lengths[0]) if token_weights is None else token_weights.split(batch.lengths)[i]
        losses = sequence_losses(one, config)
        if losses:
            num_tokens += len(losses)
            kept = weights[one.loss_mask].tolist()
            terms.append([w * loss for w, loss in zip(kept, losses, strict=True)])
    per_sequence = {
        "token-mean": [sum(t) for t in terms],
        "seq-mean-token-sum": [sum(t) for t in terms],
        "seq-mean-token-mean": [sum(t) / len(t) for t in terms],
        "seq-mean-token-sum-norm": [sum(t) / config.norm_length for t in terms],
    }
    return sum(per_sequence[config.aggregation]), num_tokens, len(terms)


def sequence_losses(one, config):
    """Losses of one sequence's tokens under the mask; none where it is vetoed."""
    mask = one.loss_mask.tolist()
    d = [a - b if m else 0.0 for a, b, m in zip(one.log_probs.tolist(), one.old_log_probs.tolist(), mask, strict=True)]
    advantage = float(one.advantages[0])
    future, losses, dual_clipped = 0.0, [], 0
    for t in reversed(range(len(d))):
        ratio = math.exp(d[t])
        future = (d[t] if mask[t] and ratio <= config.dual_clip else 0.0) + 2 ** (-1 / config.half_life) * future
        if not mask[t]:
            continue
        weight = min(max(math.exp(future), config.influence_clip[0]), config.influence_clip[1])
        if advantage < 0 and ratio > config.safety_threshold:
            weight = min(max(weight, 0.8), 1.0)
        weighted = weight * advantage
        clipped = min(max(ratio, 1 - config.clip_ratio_low), 1 + config.clip_ratio_high)
        loss = max(-weighted * ratio, -weighted * clipped)
        if advantage < 0:
            loss = min(loss, -weighted * config.dual_clip)
            dual_clipped += ratio > config.dual_clip
        losses.insert(0, loss)
    return [] if dual_clipped > config.max_dual_clipped_tokens else losses


def loss_and_gradient(batch, config, loss=fipo_loss, **options):
    log_probs = batch.log_probs.clone().requires_grad_()
    out = loss(log_probs, *batch.inputs()[1:], config, **options)
    (gradient,) = torch.autograd.grad(out.loss_sum, log_probs)
    return out, gradient


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_written_out(aggregation, weighted):
    """Loss sum and both counts are the definition's, for every aggregation, with and without token weights."""
    config = dataclasses.replace(CONFIG, aggregation=aggregation, norm_length=64.0)
    batch = random_batch(LENGTHS, spread=1.0)
    token_weights = torch.linspace(0.5, 2.0, sum(LENGTHS), dtype=torch.float64) if weighted else None
    out = fipo_loss(*batch.inputs(), config, token_weights)
    loss_sum, num_tokens, num_sequences = written_out(batch, config, token_weights)
    assert out.vetoed.any()
    assert out.loss_sum.item() == pytest.approx(loss_sum, rel=1e-12)
    assert (out.num_tokens.item(), out.num_sequences.item()) == (num_tokens, num_sequences)
    assert out.denominator.item() == (num_tokens if aggregation == "token-mean" else num_sequences)
    assert out.num_tokens.dtype == out.num_sequences.dtype == torch.int64


def test_gradient_is_the_closed_form():
    """d(loss)/d(logp) = -f A r where no clip is active, else 0; the weight f is a constant."""
    batch = random_batch(LENGTHS)
    out, gradient = loss_and_gradient(batch, CONFIG)
    sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    advantage = batch.advantages[sequence]
    ratio = torch.where(batch.loss_mask, batch.log_probs - batch.old_log_probs, 0.0).exp()
    clipped = ((advantage > 0) & (ratio > 1.28)) | ((advantage < 0) & ((ratio < 0.8) | (ratio > CONFIG.dual_clip)))
    active = batch.loss_mask & ~clipped & ~out.vetoed[sequence]
    expected = torch.where(active, -out.influence_weights * advantage * ratio, 0.0)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


@settings(max_examples=4)
@given(seed=st.integers(0, 100))
def test_gradcheck_of_grpo(seed):
    """Numerical derivatives agree, away from the kinks (GRPO: FIPO's weight is a constant only by decree)."""
    batch = random_batch([6, 3], seed, spread=0.05)
    log_probs = torch.where(batch.loss_mask, batch.log_probs, 0.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grpo_loss(x, *batch.inputs()[1:], CONFIG).loss_sum, log_probs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_under_the_mask(dtype):
    """Masked positions may hold NaN or infinity in every input: result and gradient are those of zeros there."""
    batch = random_batch(LENGTHS, dtype=dtype)
    hidden = ~batch.loss_mask
    per_token = batch.advantages.repeat_interleave(torch.tensor(LENGTHS))
    results = []
    for filler in (0.0, math.nan, math.inf, -math.inf):
        filled = [x.masked_fill(hidden, filler) for x in (batch.log_probs, batch.old_log_probs, per_token)]
        weights = torch.ones_like(per_token).masked_fill(hidden, filler)
        log_probs = filled[0].requires_grad_()
        out = fipo_loss(log_probs, *filled[1:], batch.loss_mask.to(dtype), batch.cu_seqlens, CONFIG, weights)
        results.append((out.loss_sum, torch.autograd.grad(out.loss_sum, log_probs)[0], finalize(out.metrics)))
    for loss, gradient, metrics in results:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])
        assert metrics == results[0][2]
    assert (results[1][1][hidden] == 0).all()


@pytest.mark.parametrize("influence_clip", [(1.0, 1.2), None])
def test_exp_of_future_kl_may_overflow(influence_clip):
    """S of 2,000 nats and more, where exp overflows, gives the upper bound as weight and finite metrics."""
    old = torch.full((4000,), -3.0)
    config = FIPOLossConfig(influence_clip=influence_clip, half_life=1e5)
    batch = PackedBatch(old + 2.0, old, torch.tensor([-1.0]), torch.ones(4000, dtype=torch.bool), [4000])
    out, gradient = loss_and_gradient(batch, config)
    assert out.future_kl[0] > 2000
    assert out.influence_weights[0].item() == pytest.approx(1.2 if influence_clip else 10.0)
    assert gradient.isfinite().all()
    assert all(math.isfinite(value) for value in finalize(out.metrics).values())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("loss", [fipo_loss, grpo_loss])
def test_same_for_any_micro_batches(aggregation, parts, loss):
    """Loss, gradient and merged metrics do not depend on how sequences are dealt to micro-batches."""
    config = dataclasses.replace(CONFIG, aggregation=aggregation)
    batch = random_batch(LENGTHS, dtype=torch.float32)
    whole, gradient = loss_and_gradient(batch, config, loss)
    loss_sum, denominator, metrics = 0.0, 0, {}
    gradients = list(gradient.split(LENGTHS))
    for part in range(parts):
        chosen = list(range(part, len(LENGTHS), parts))
        out, part_gradient = loss_and_gradient(batch.sequences(chosen), config, loss)
        loss_sum, denominator = loss_sum + out.loss_sum.item(), denominator + int(out.denominator)
        metrics = merge(metrics, out.metrics)
        for i, piece in zip(chosen, part_gradient.split([LENGTHS[i] for i in chosen]), strict=True):
            torch.testing.assert_close(piece, gradients[i], rtol=1e-6, atol=1e-6)
    assert loss_sum == pytest.approx(whole.loss_sum.item(), rel=1e-6)
    assert denominator == int(whole.denominator)
    assert finalize(metrics) == pytest.approx(finalize(whole.metrics), rel=1e-6)
    assert finalize(metrics)["loss"] == pytest.approx(loss_sum / denominator, rel=1e-6)


def test_padded_equals_packed():
    """Rows padded to a rectangle, masked behind their end, give the packed loss, gradient and metrics."""
    batch = random_batch(LENGTHS)
    width, rows = max(LENGTHS) + 3, len(LENGTHS)
    inside = torch.arange(width)[None] < torch.tensor(LENGTHS)[:, None]  # [B, T]

    def padded(packed, filler):
        return torch.full((rows, width), filler, dtype=packed.dtype).masked_scatter(inside, packed).flatten()

    wide = PackedBatch(
        padded(batch.log_probs, math.nan),
        padded(batch.old_log_probs, math.nan),
        batch.advantages,
        padded(batch.loss_mask, False),
        [width] * rows,
    )
    out, gradient = loss_and_gradient(batch, CONFIG)
    wide_out, wide_gradient = loss_and_gradient(wide, CONFIG)
    torch.testing.assert_close(wide_gradient[inside.flatten()], gradient)
    torch.testing.assert_close(wide_out.loss_sum, out.loss_sum)
    assert finalize(wide_out.metrics) == pytest.approx(finalize(out.metrics))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_grpo_is_fipo_with_weight_one(aggregation):
    """grpo_loss = fipo_loss with the influence clip at (1, 1), bit for bit."""
    config = dataclasses.replace(CONFIG, influence_clip=(1.0, 1.0), aggregation=aggregation)
    batch = random_batch(LENGTHS)
    fipo, fipo_gradient = loss_and_gradient(batch, config)
    grpo, grpo_gradient = loss_and_gradient(batch, config, grpo_loss)
    assert torch.equal(fipo.loss_sum, grpo.loss_sum)
    assert torch.equal(fipo_gradient, grpo_gradient)
    assert (grpo.influence_weights == 1).all()
    assert (grpo.future_kl == 0).all()
    assert not [name for name in grpo.metrics if name.startswith(("influence", "future_kl"))]


@pytest.mark.parametrize("lengths", [[], [0, 0], [5, 3]])
@pytest.mark.parametrize("loss", [fipo_loss, grpo_loss])
def test_nothing_survives(lengths, loss):
    """No tokens, or all of them masked: loss 0, gradient 0, counts 0, every metric 0, same metric names."""
    batch = random_batch(lengths)
    batch.loss_mask = torch.zeros(sum(lengths), dtype=torch.bool)
    out, gradient = loss_and_gradient(batch, CONFIG, loss)
    assert (out.loss_sum.item(), int(out.num_tokens), int(out.num_sequences)) == (0.0, 0, 0)
    assert (gradient == 0).all()
    assert set(finalize(out.metrics).values()) <= {0.0}
    assert out.metrics.keys() == loss(*random_batch([4]).inputs(), CONFIG).metrics.keys()


@pytest.mark.parametrize(
    ("allowed", "vetoed"), [(0, [True, True, False]), (1, [False, True, False]), (None, [False] * 3)]
)
def test_veto(allowed, vetoed):
    """A sequence with A < 0 and more than the allowed ratios above the dual clip leaves the loss; A > 0 never does."""
    d = torch.tensor([3.0, 0.0, 0.0, 3.0, 3.0, 0.0, 3.0, 3.0, 3.0])
    old = torch.full((9,), -4.0)
    batch = PackedBatch(old + d, old, torch.tensor([-1.0, -1.0, 1.0]), torch.ones(9, dtype=torch.bool), [3, 3, 3])
    out, gradient = loss_and_gradient(batch, dataclasses.replace(CONFIG, max_dual_clipped_tokens=allowed))
    assert out.vetoed.tolist() == vetoed
    assert int(out.num_tokens) == 9 - 3 * sum(vetoed)
    assert finalize(out.metrics)["vetoed_fraction"] == pytest.approx(sum(vetoed) / 3)
    for gone, piece in zip(vetoed, gradient.split(3), strict=True):
        assert not (gone and piece.any())


def test_veto_and_ratio_metrics_ignore_token_weights():
    """token_weights change the loss and the metric of that name only."""
    batch = random_batch(LENGTHS)
    plain = finalize(fipo_loss(*batch.inputs(), CONFIG).metrics)
    weighted = finalize(fipo_loss(*batch.inputs(), CONFIG, torch.full((sum(LENGTHS),), 0.5)).metrics)
    assert weighted.pop("loss") == pytest.approx(0.5 * plain.pop("loss"))
    assert weighted == plain


def test_on_policy_is_grpo():
    """With log_probs = old_log_probs every S is 0, every weight 1, the ratio quantiles exactly 1."""
    batch = random_batch(LENGTHS)
    batch.old_log_probs = batch.log_probs.clone()
    out, gradient = loss_and_gradient(batch, FIPOLossConfig())
    assert (out.future_kl == 0).all()
    assert torch.equal(gradient, loss_and_gradient(batch, FIPOLossConfig(), grpo_loss)[1])
    metrics = finalize(out.metrics)
    assert metrics["log_ratio_abs_max"] == 0
    assert metrics["positive_ratio_median"] == metrics["negative_ratio_p999"] == 1


def test_per_token_advantages():
    """Advantages [N] equal to [S] spread over the tokens give the same loss; 0/1 masks equal bool ones."""
    batch = random_batch(LENGTHS)
    spread = batch.advantages.repeat_interleave(torch.tensor(LENGTHS))
    a = fipo_loss(*batch.inputs(), CONFIG)
    b = fipo_loss(batch.log_probs, batch.old_log_probs, spread, batch.loss_mask.long(), batch.cu_seqlens.int(), CONFIG)
    assert torch.equal(a.loss_sum, b.loss_sum)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_cuda(aggregation):
    """On CUDA the host never waits, and loss, gradient and metrics are the CPU's."""
    config = dataclasses.replace(CONFIG, aggregation=aggregation)
    batch = random_batch(LENGTHS)
    inputs = [x.cuda() for x in (*batch.inputs(), torch.ones(sum(LENGTHS), dtype=torch.float64))]
    log_probs = inputs[0].requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = fipo_loss(log_probs, *inputs[1:5], config, inputs[5])
        (gradient,) = torch.autograd.grad(out.loss_sum, log_probs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, expected_gradient = loss_and_gradient(batch, config)
    torch.testing.assert_close(out.loss_sum.cpu(), expected.loss_sum)
    torch.testing.assert_close(gradient.cpu(), expected_gradient)
    assert finalize(out.metrics) == pytest.approx(finalize(expected.metrics))
