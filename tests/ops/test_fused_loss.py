"""The compiled loss against the reference in float64, on every packing that training can produce."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.algorithm import FIPOLossConfig, Mean, fipo_loss, grpo_loss, merge
from megatron_fipo.config.loss import AGGREGATIONS
from megatron_fipo.ops import extension
from tests.ops.agreement import CONFIG, LENGTHS, assert_agrees, assert_metrics_agree, exact_batch, run, widened

pytestmark = pytest.mark.skipif(not extension.is_built(), reason="the extension is not built")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", [fipo_loss, grpo_loss])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_reference(aggregation, loss, weighted):
    """Every aggregation, with and without token weights, for FIPO and DAPO/GRPO; some sequences are vetoed."""
    batch = exact_batch(LENGTHS, spread=1.5)
    config = dataclasses.replace(CONFIG, aggregation=aggregation, norm_length=64.0)
    token_weights = torch.linspace(0.5, 2.0, sum(LENGTHS)).masked_fill(~batch.loss_mask, math.nan) if weighted else None
    assert run(batch, config, "compiled", loss)[0].vetoed.any()
    if weighted:
        token_weights = torch.where(batch.loss_mask, token_weights, 0.0)
    assert_agrees(batch, config, loss, token_weights)


EDGE_CASES = {
    "no sequences": [],
    "only empty sequences": [0, 0, 0],
    "one token": [1],
    "one-token sequences": [1] * 100,
    "empty ones between": [0, 5, 0, 0, 7, 0],
    "unaligned": [3, 16, 17, 15, 31, 33, 1, 255, 257, 256],
    "tiles": [131072],
    "just tiled, and not": [32769, 32768, 40000],
}


@pytest.mark.parametrize("lengths", EDGE_CASES.values(), ids=EDGE_CASES.keys())
def test_edge_lengths(lengths):
    """Empty, one-token, unaligned and very long sequences."""
    assert_agrees(exact_batch(lengths, spread=0.1), CONFIG)


def test_many_sequences():
    """100,000 sequences of 0 to 6 tokens."""
    assert_agrees(exact_batch([(i * 7919) % 7 for i in range(100_000)]), CONFIG)


@pytest.mark.parametrize("half_life", [0.5, 8.0, 256.0, 1e6])
@pytest.mark.parametrize("influence_clip", [None, (1.0, 1.2)])
def test_large_log_ratios(half_life, influence_clip):
    """Log-ratios beyond the clamp, and Future-KL whose exp is beyond float32 and float64, on both sides of 0."""
    config = dataclasses.replace(CONFIG, half_life=half_life, influence_clip=influence_clip)
    batch = exact_batch([900, 900, 50, 1], spread=8.0)
    assert_agrees(batch, config)
    rising = dataclasses.replace(batch, log_probs=batch.old_log_probs + 2.0)
    assert_agrees(rising, config)
    falling = dataclasses.replace(batch, log_probs=batch.old_log_probs - 2.0)
    assert_agrees(falling, config)


@pytest.mark.parametrize("tokens", ["all", "one sequence"])
def test_all_masked(tokens):
    """Sequences without a loss token, whatever NaN they hold, count nowhere and get no gradient."""
    batch = exact_batch(LENGTHS)
    hidden = torch.ones_like(batch.loss_mask) if tokens == "all" else torch.arange(sum(LENGTHS)) < LENGTHS[0]
    batch.loss_mask &= ~hidden
    batch.log_probs[hidden] = math.nan
    batch.old_log_probs[hidden] = math.inf
    assert_agrees(batch, CONFIG)
    out, gradient = run(batch, CONFIG, "compiled")
    assert not gradient[hidden].any()
    if tokens == "all":
        assert (out.loss_sum, out.num_tokens, out.num_sequences) == (0, 0, 0)


@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf])
def test_anything_under_the_mask(filler):
    """The values of masked positions, in any per-token input, change no bit."""
    batch = exact_batch(LENGTHS)
    per_token = batch.advantages.repeat_interleave(torch.tensor(LENGTHS))
    results = []
    for hidden in (0.0, filler):
        filled = [x.masked_fill(~batch.loss_mask, hidden) for x in (batch.log_probs, batch.old_log_probs, per_token)]
        weights = torch.ones_like(per_token).masked_fill(~batch.loss_mask, hidden)
        log_probs = filled[0].requires_grad_()
        out = fipo_loss(log_probs, *filled[1:], batch.loss_mask, batch.cu_seqlens, CONFIG, weights, backend="compiled")
        results.append((out.loss_sum, *torch.autograd.grad(out.loss_sum, log_probs), out.future_kl))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", ["per token", "per sequence", "zero"])
@pytest.mark.parametrize("spread", [0.05, 0.8])
def test_advantages(kind, spread):
    """Advantages per token, per sequence, and all zero, which gives loss 0 and no gradient."""
    batch = exact_batch(LENGTHS, spread=spread)
    if kind == "per token":
        generator = torch.Generator().manual_seed(1)
        batch.advantages = torch.randn(sum(LENGTHS), generator=generator)
    elif kind == "zero":
        batch.advantages.zero_()
    assert_agrees(batch, CONFIG)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
@pytest.mark.parametrize("loss", [fipo_loss, grpo_loss])
def test_no_tokens_with_per_token_advantages(lengths, loss):
    """Per-token advantages of no tokens, an empty tensor without memory, are not read for the empty sequences."""
    batch = exact_batch(lengths)
    batch.advantages = torch.zeros(0)
    assert_agrees(batch, CONFIG, loss)
    assert_agrees(batch, dataclasses.replace(CONFIG, aggregation="seq-mean-token-mean"), loss)


def test_first_mini_batch():
    """Equal log-probabilities: S is exactly 0, the weights exactly 1, and both histograms hold one bin."""
    batch = exact_batch(LENGTHS)
    batch.log_probs = batch.old_log_probs
    assert_agrees(batch, FIPOLossConfig())
    out, _ = run(batch, FIPOLossConfig(), "compiled")
    assert not out.future_kl.any()
    assert (out.influence_weights == 1).all()
    assert out.metrics["negative_ratio_histogram"].count_nonzero() == 1


@pytest.mark.parametrize("step", [1, 3, 4])
def test_nearly_equal_log_probabilities(step):
    """Log-ratios of one histogram bin, and of two neighbouring ones."""
    batch = exact_batch([*LENGTHS, 2000])
    batch.log_probs = batch.old_log_probs + step / 1024 * (torch.arange(sum(batch.lengths)) % 2)
    assert_agrees(batch, FIPOLossConfig())


@pytest.mark.parametrize("wild", [-3.0, 3.0, 30.0])
@pytest.mark.parametrize("per_token", [False, True])
def test_wild_tokens_change_no_other(wild, per_token):
    """Extreme ratios, for which the loop over their block leaves nothing out, move no bit of the tokens after them."""
    batch = exact_batch([300, 40, 3000, 2500], spread=0.05)
    first = batch.cu_seqlens[:-1]
    batch.loss_mask[first] = True
    if per_token:
        batch.advantages = batch.advantages.repeat_interleave(torch.tensor(batch.lengths))
    results = []
    for shift in (0.0, wild):
        batch.log_probs[first] = batch.old_log_probs[first] + shift
        out, gradient = run(batch, CONFIG, "compiled")
        assert not out.vetoed.any()
        results.append((gradient, out.future_kl, out.influence_weights))
    others = torch.ones_like(batch.loss_mask).index_fill(0, first, False)
    assert all(torch.equal(usual[others], beside[others]) for usual, beside in zip(*results, strict=True))


@pytest.mark.parametrize("thresholds", [{"safety_threshold": 1.2}, {"dual_clip": 1.5}])
def test_thresholds_within_small_log_ratios(thresholds):
    """Thresholds that log-ratios up to 0.64 cross, where everything else is ordinary."""
    config = dataclasses.replace(CONFIG, **{"safety_threshold": 10.0, "max_dual_clipped_tokens": None, **thresholds})
    batch = exact_batch([2000, 300], spread=0.3)
    batch.log_probs = batch.old_log_probs + (batch.log_probs - batch.old_log_probs).clamp(-0.640625, 0.640625)
    for sign in (1, -1):
        batch.advantages = torch.tensor([1.0, -1.0]) * sign
        assert_agrees(batch, config)


def test_large_future_kl_of_small_log_ratios():
    """Log-ratios of 0.5 add up beyond what float32 can exponentiate; masked tokens before them keep their weights."""
    lengths, masked = [4000, 3000], 2500
    batch = exact_batch(lengths)
    batch.old_log_probs = batch.old_log_probs.nan_to_num()
    batch.log_probs = batch.old_log_probs + 0.5
    batch.loss_mask[:] = True
    batch.loss_mask[:masked] = False
    config = dataclasses.replace(CONFIG, half_life=1000.0, influence_clip=None)
    assert_agrees(batch, config)
    weights = run(batch, config, "compiled")[0].influence_weights
    assert (weights[:masked] == config.influence_bounds[1]).all()


@pytest.mark.parametrize("spread", [0.05, 0.8])
def test_nan_reaches_the_loss(spread):
    """A NaN that the mask lets through is not hidden, whatever is around it: loss and gradient say so."""
    batch = exact_batch([20, 20], spread=spread)
    batch.loss_mask[25] = True
    batch.log_probs[25] = math.nan
    out, gradient = run(batch, CONFIG, "compiled")
    assert out.loss_sum.isnan()
    assert gradient[25].isnan()
    assert not gradient[:20].isnan().any()


def test_inputs_of_other_layouts():
    """Strided inputs, int32 offsets, float and integer masks give what contiguous ones give."""
    batch = exact_batch(LENGTHS)
    expected, _ = run(batch, CONFIG, "compiled")

    def strided(x):
        return torch.stack([x, x], dim=1)[:, 0]

    log_probs, old, advantages, mask, offsets = batch.inputs()
    for some_mask in (strided(mask), mask.float(), mask.long(), mask.to(torch.uint8)):
        inputs = (strided(log_probs), strided(old), strided(advantages), some_mask, offsets.int())
        assert not inputs[0].is_contiguous()
        out = fipo_loss(*inputs, CONFIG, backend="compiled")
        assert torch.equal(out.loss_sum, expected.loss_sum)
        assert torch.equal(out.future_kl, expected.future_kl)


def test_gradient_scales():
    """The gradient in the forward pass is multiplied by what the backward pass brings."""
    batch = exact_batch(LENGTHS)
    log_probs = batch.log_probs.clone().requires_grad_()
    (3.0 * fipo_loss(log_probs, *batch.inputs()[1:], CONFIG, backend="compiled").loss_sum).backward()
    torch.testing.assert_close(log_probs.grad, 3.0 * run(batch, CONFIG, "compiled")[1], rtol=1e-6, atol=0)


def test_packing_changes_no_bit():
    """A sequence gives the same Future-KL and gradient alone and packed at any offset."""
    batch = exact_batch([*LENGTHS, 40000])
    packed, gradient = run(batch, CONFIG, "compiled")
    for i, (future, part) in enumerate(
        zip(packed.future_kl.split(batch.lengths), gradient.split(batch.lengths), strict=True)
    ):
        alone, alone_gradient = run(batch.sequences([i]), CONFIG, "compiled")
        assert torch.equal(alone.future_kl, future)
        assert torch.equal(alone_gradient, part)


def test_threads_change_no_bit():
    """One thread and several give the same bits, again and again, for grouped, single and tiled sequences."""
    batch = exact_batch([*LENGTHS * 30, 20480, 100_000])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5, 2):
            torch.set_num_threads(count)
            out, gradient = run(batch, CONFIG, "compiled")
            flat = [part for value in out.metrics.values() for part in (value if isinstance(value, Mean) else [value])]
            results.append([out.loss_sum, gradient, out.future_kl, *flat])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_metrics_merge_with_the_reference():
    """Metrics of one micro-batch from the compiled loss and of another from the reference merge into the whole's."""
    batch = exact_batch(LENGTHS)
    half = len(LENGTHS) // 2
    parts = [batch.sequences(list(range(half))), batch.sequences(list(range(half, len(LENGTHS))))]
    metrics = [
        run(part, CONFIG, backend)[0].metrics for part, backend in zip(parts, ("compiled", "reference"), strict=True)
    ]
    whole = run(widened(batch), CONFIG, "reference")[0].metrics
    assert_metrics_agree(merge(*metrics), whole, largest=30.0, loss_size=1e3)


lengths_strategy = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 70), st.integers(200, 600)), max_size=8)
config_strategy = st.builds(
    FIPOLossConfig,
    half_life=st.sampled_from([0.5, 8.0, 32.0, 256.0, 1e6]),
    influence_clip=st.sampled_from([None, (1.0, 1.2), (0.8, 1.2), (0.0, 3.0)]),
    dual_clip=st.sampled_from([3.0, 10.0]),
    safety_threshold=st.sampled_from([1.5, 3.0, 10.0]),
    max_dual_clipped_tokens=st.sampled_from([None, 0, 1, 5]),
    aggregation=st.sampled_from(AGGREGATIONS),
    norm_length=st.just(100.0),
)


def check_random(lengths, config, seed, spread, per_token, weighted, loss):
    batch = exact_batch(lengths, seed, spread)
    generator = torch.Generator().manual_seed(seed)
    if per_token:
        batch.advantages = torch.randn(sum(lengths), generator=generator)
    token_weights = torch.rand(sum(lengths), generator=generator) if weighted and sum(lengths) else None
    assert_agrees(batch, config, loss, token_weights)


random_inputs = given(
    lengths=lengths_strategy,
    config=config_strategy,
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.0, 0.01, 0.3, 1.5, 10.0]),
    per_token=st.booleans(),
    weighted=st.booleans(),
    loss=st.sampled_from([fipo_loss, grpo_loss]),
)
test_random = settings(max_examples=60)(random_inputs(check_random))
test_random_at_length = pytest.mark.slow(settings(max_examples=3000)(random_inputs(check_random)))
