"""The compiled ops against the reference in float64, on every packing that training can produce.

Log-probabilities are multiples of 2^-10, so that their float32 differences are exact and both sides agree about which
side of a threshold a ratio is on. N: packed tokens, S: sequences.
"""

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.algorithm import FIPOLossConfig, Mean, fipo_loss, grpo_loss, merge
from megatron_fipo.algorithm.loss_config import AGGREGATIONS
from megatron_fipo.ops import extension, future_kl
from megatron_fipo.ops.reference import future_kl_loop
from tests.algorithm.packed_batch import PackedBatch, random_batch

pytestmark = pytest.mark.skipif(not extension.is_built(), reason="the extension is not built")

CONFIG = FIPOLossConfig(influence_clip=(0.8, 1.2), safety_threshold=3.0)
LENGTHS = [17, 1, 40, 0, 9, 33, 64, 5, 26, 0, 300]
OPS = torch.ops.megatron_fipo


def exact_batch(lengths, seed=0, spread=0.8):
    """A random float32 batch whose log-ratios are exact, NaN under its mask."""
    batch = random_batch(lengths, seed, spread)
    old, new = ((x * 1024).round() / 1024 for x in (batch.old_log_probs, batch.log_probs))
    return PackedBatch(new.float(), old.float(), batch.advantages.float(), batch.loss_mask, batch.lengths)


def widened(batch):
    """The same numbers in float64."""
    return PackedBatch(
        batch.log_probs.double(),
        batch.old_log_probs.double(),
        batch.advantages.double(),
        batch.loss_mask,
        batch.lengths,
    )


def run(batch, config, backend, loss=fipo_loss, token_weights=None):
    log_probs = batch.log_probs.clone().requires_grad_()
    weights = None if token_weights is None else token_weights.to(log_probs.dtype)
    out = loss(log_probs, *batch.inputs()[1:], config, weights, backend=backend)
    (gradient,) = torch.autograd.grad(out.loss_sum, log_probs)
    return out, gradient


def assert_agrees(batch, config, loss=fipo_loss, token_weights=None):
    """Loss, gradient, weights, counts and every metric of the compiled loss are the float64 reference's."""
    compiled, gradient = run(batch, config, "compiled", loss, token_weights)
    expected, wanted_gradient = run(widened(batch), config, "reference", loss, token_weights)
    mask = batch.loss_mask
    largest = max(1.0, expected.future_kl.abs().max().item()) if mask.numel() else 1.0
    error_of_weight = 1e-6 * largest  # exp turns an error of S into a relative one
    close = torch.testing.assert_close
    close(compiled.future_kl.double(), expected.future_kl, rtol=0, atol=1e-6 * largest)
    for actual, wanted in ((compiled.influence_weights, expected.influence_weights), (gradient, wanted_gradient)):
        scale = wanted[mask].abs().max().item() if mask.any() else 1.0
        close(actual.double()[mask], wanted[mask], rtol=1e-5, atol=(1e-5 + error_of_weight) * scale)
    assert not gradient[~mask].any()
    size = 12.0 * batch.advantages.abs().double().max().item() * max(1, mask.numel()) if mask.numel() else 1.0
    size *= 1.0 if token_weights is None else token_weights.abs().max().item()
    close(compiled.loss_sum.double(), expected.loss_sum, rtol=1e-5, atol=1e-6 * size)
    for name in ("num_tokens", "num_sequences", "denominator", "vetoed"):
        assert torch.equal(getattr(compiled, name), getattr(expected, name)), name
    wanted_metrics = dict(expected.metrics)
    if config.influence_bounds[0] == 0 and largest > 80:
        wanted_metrics.pop("ppo_clip_fraction")  # a weight that underflows in float32 leaves nothing to clip
        compiled.metrics.pop("ppo_clip_fraction")
    assert_metrics_agree(compiled.metrics, wanted_metrics, largest, size, ambiguous(expected, mask, config, largest))


def ambiguous(expected, mask, config, largest):
    """Tokens whose float64 weight is within float32 rounding of a bound: float32 may count them on either side."""
    near = torch.zeros_like(mask)
    for bound in config.influence_bounds:
        rounding = 3e-7 * max(1.0, bound) + 1e-6 * largest * bound
        near |= (expected.future_kl.exp() - bound).abs() <= rounding
    return int((near & mask).sum())


def assert_metrics_agree(actual, expected, largest, loss_size, pinned_either_way=0):
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        value = actual[name]
        if name.endswith("_histogram"):
            assert torch.equal(value, wanted), name
            continue
        tolerance = {"rtol": 1e-3 if "raw" in name else 1e-5, "atol": 1e-6 * largest}
        if isinstance(wanted, Mean):
            assert isinstance(value, Mean)
            assert value.count == wanted.count, name
            size = loss_size if name == "loss" else max(1.0, largest * wanted.count.item())
            tolerance["atol"] = 1e-6 * size
            if "clip_fraction" in name:  # a count: exact
                tolerance = {"rtol": 0, "atol": pinned_either_way if "influence" in name else 0}
            value, wanted = value.sum, wanted.sum
        assert value.dtype == wanted.dtype == torch.float64
        torch.testing.assert_close(value, wanted, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# ---- the loss ----


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
    """What masked positions hold, in any per-token input, changes no bit."""
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
def test_advantages(kind):
    """Advantages per token, per sequence, and all zero, which gives loss 0 and no gradient."""
    batch = exact_batch(LENGTHS)
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


def test_nan_reaches_the_loss():
    """A NaN that the mask lets through is not hidden: loss and gradient say so."""
    batch = exact_batch([20, 20])
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
test_random = settings(deadline=None, max_examples=60, derandomize=True)(random_inputs(check_random))
test_random_at_length = pytest.mark.slow(settings(deadline=None, max_examples=3000)(random_inputs(check_random)))


# ---- the scan and the sharded form ----


@pytest.mark.parametrize("half_life", [0.5, 32.0, 1e6])
@pytest.mark.parametrize("lengths", [LENGTHS, [131072], [50000, 3, 20000]])
def test_scan(half_life, lengths):
    """The scan is the loop that defines it, to 1e-6 of the largest |S|."""
    batch = exact_batch(lengths)
    log_ratio = batch.log_probs - batch.old_log_probs
    expected = future_kl_loop(log_ratio.double(), batch.loss_mask, batch.cu_seqlens, half_life)
    actual = future_kl(log_ratio, batch.loss_mask, batch.cu_seqlens, half_life)
    assert (actual - expected).abs().max() < 1e-6 * expected.abs().max()


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


def chunk_loss(batch, config, summaries, chunk, half):
    """The op on one of two chunks of every sequence, told what the other chunk's summary says."""
    (first, second), cut = summaries, chunk["cut"]
    dual_clipped, tokens = first[1] + second[1], first[2] + second[2]
    carry = second[0] if half == 0 else torch.zeros_like(second[0])
    return OPS.fipo_loss(
        *chunk["inputs"][half],
        None,
        carry,
        dual_clipped > config.max_dual_clipped_tokens,
        tokens,
        torch.full((len(cut),), half == 1),
        half_life=config.half_life,
        influence_low=config.influence_clip[0],
        influence_high=config.influence_clip[1],
        clip_ratio_low=config.clip_ratio_low,
        clip_ratio_high=config.clip_ratio_high,
        dual_clip=config.dual_clip,
        safety_threshold=config.safety_threshold,
        log_ratio_clamp=config.log_ratio_clamp,
        norm_length=config.norm_length,
        max_dual_clipped=-1,
        aggregation=config.aggregation,
        with_weights=True,
    )


def chunks(batch):
    """Each sequence cut at a third of its length into two segments: the inputs of the first parts, of the second."""
    cut = [length // 3 for length in batch.lengths]
    parts = ([], [])
    for start, length, at in zip(batch.cu_seqlens.tolist(), batch.lengths, cut, strict=False):
        parts[0].append(torch.arange(start, start + at))
        parts[1].append(torch.arange(start + at, start + length))
    inputs = []
    for part in parts:
        index = torch.cat(part)
        offsets = torch.tensor([0, *(p.numel() for p in part)]).cumsum(0)
        tokens = [x[index] for x in (batch.log_probs, batch.old_log_probs)]
        inputs.append((*tokens, batch.advantages, batch.loss_mask[index], offsets))
    return {"inputs": inputs, "cut": cut, "index": [torch.cat(part) for part in parts]}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_chunks_equal_the_whole(aggregation):
    """Sequences cut in two and told each other's summaries give the loss, gradient and counts of whole ones."""
    config = dataclasses.replace(CONFIG, aggregation=aggregation, norm_length=10.0)
    batch = exact_batch([*LENGTHS, 2, 150_000], spread=1.2)
    whole, gradient = run(batch, config, "compiled")
    chunk = chunks(batch)
    summaries = [
        OPS.chunk_summary(*inputs, config.half_life, config.log_ratio_clamp, math.log(config.dual_clip))
        for inputs in chunk["inputs"]
    ]
    outputs = [chunk_loss(batch, config, summaries, chunk, half) for half in (0, 1)]
    assembled = torch.empty_like(gradient), torch.empty_like(gradient)
    for index, output in zip(chunk["index"], outputs, strict=True):
        assembled[0][index], assembled[1][index] = output[1], output[5]
        assert torch.equal(output[4], whole.vetoed)
    torch.testing.assert_close(assembled[0], gradient, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(assembled[1], whole.future_kl, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs[0][0] + outputs[1][0], whole.loss_sum, rtol=1e-5, atol=1e-3)
    slots = extension.metric_slots()
    for name, wanted in {
        "num_tokens": whole.num_tokens,
        "num_sequences": whole.num_sequences,
        "vetoed": whole.vetoed.sum(),
        "loss_sequences": whole.metrics["vetoed_fraction"].count,
    }.items():
        assert sum(output[2][slots[name]] for output in outputs) == wanted, name
    assert torch.equal(outputs[0][3][0] + outputs[1][3][0], whole.metrics["negative_ratio_histogram"])


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


# ---- the ops as torch sees them ----


def op_arguments(batch):
    inputs = (batch.log_probs.clone().requires_grad_(), *batch.inputs()[1:], None)
    constants = {
        "half_life": 32.0,
        "influence_low": 0.8,
        "influence_high": 1.2,
        "clip_ratio_low": 0.2,
        "clip_ratio_high": 0.28,
        "dual_clip": 10.0,
        "safety_threshold": 3.0,
        "log_ratio_clamp": 20.0,
        "norm_length": 1.0,
        "max_dual_clipped": 1,
        "aggregation": "token-mean",
    }
    return inputs, constants


@pytest.mark.parametrize("with_weights", [False, True])
def test_opcheck(with_weights):
    """Schema, fake kernel and autograd of the three ops hold what torch asks of them."""
    batch = exact_batch(LENGTHS)
    inputs, constants = op_arguments(batch)
    torch.library.opcheck(OPS.fipo_loss.default, inputs, {**constants, "with_weights": with_weights})
    log_probs, old, advantages, mask, offsets, _ = (x if x is None else x.detach() for x in inputs)
    torch.library.opcheck(OPS.future_kl_scan.default, (log_probs, old, mask, offsets, 32.0, 20.0, 2.3))
    torch.library.opcheck(OPS.future_kl_scan.default, (log_probs, None, mask, offsets, 32.0, 20.0, 2.3, advantages))
    torch.library.opcheck(OPS.chunk_summary.default, (log_probs, old, advantages, mask, offsets, 32.0, 20.0, 2.3))


def test_compile():
    """torch.compile takes the op into one graph, forward and backward."""
    inputs, constants = op_arguments(exact_batch(LENGTHS))

    def loss(log_probs):
        out = OPS.fipo_loss(log_probs, *inputs[1:], **constants)
        return out[0] / out[2][1].clamp(min=1)

    expected = torch.autograd.grad(loss(inputs[0]), inputs[0])[0]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(inputs[0])
    assert torch.equal(torch.autograd.grad(compiled, inputs[0])[0], expected)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(495, dtype=torch.float64), r"log_probs must be \[N\] float32 on cpu"),
        (0, torch.zeros(5, 99), "log_probs must be"),
        (1, torch.zeros(494), r"old_log_probs must be \[495\] float32, not \[494\]"),
        (1, torch.zeros(495, dtype=torch.float16), "old_log_probs must be .*float16"),
        (2, torch.zeros(12), r"advantages must be \[11\]"),
        (3, torch.zeros(495), "mask must be .* bool or uint8, not .*float32"),
        (4, torch.tensor([0, 494]), "from 0 to the 495 packed tokens, not from 0 to 494"),
        (4, torch.tensor([0, 600, 495]), "must not decrease"),
        (4, torch.tensor([0.0, 495.0]), "int32 or int64"),
        (5, torch.ones(3), r"token_weights must be \[495\]"),
        (6, torch.ones(3), r"carry_in must be \[11\]"),
        (6, torch.ones(11, dtype=torch.float64), "carry_in must be .*float64"),
        (9, torch.ones(11, dtype=torch.bool), "needs sequence_tokens"),
    ],
)
def test_op_errors(position, value, message):
    """No input that the kernels do not expect reaches them."""
    inputs, constants = op_arguments(exact_batch(LENGTHS))
    inputs = [*inputs, None, None, None, None]
    inputs[position] = value
    with pytest.raises(ValueError, match=message):
        OPS.fipo_loss(*inputs, **constants)


def test_backend_errors(monkeypatch):
    """ "compiled" is refused where it cannot be had, and says why; "auto" falls back to the reference."""
    batch = widened(exact_batch(LENGTHS))
    with pytest.raises(ValueError, match=r"not built for torch\.float64 on cpu"):
        fipo_loss(*batch.inputs(), CONFIG, backend="compiled")
    assert fipo_loss(*batch.inputs(), CONFIG, backend="auto").loss_sum.dtype == torch.float64
    monkeypatch.setattr(extension, "_extension", None)
    with pytest.raises(ValueError, match="not built; the losses run in plain torch"):
        fipo_loss(*exact_batch(LENGTHS).inputs(), CONFIG, backend="compiled")
    assert fipo_loss(*exact_batch(LENGTHS).inputs(), CONFIG).num_tokens > 0


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_instruction_sets(isa):
    """The numbers in this file and the golden vectors hold on every instruction set this machine has, when forced."""
    if "MEGATRON_FIPO_ISA" in os.environ:
        pytest.skip("one is forced already")
    environment = {**os.environ, "MEGATRON_FIPO_ISA": isa}
    probe = subprocess.run(
        [sys.executable, "-c", "from megatron_fipo.ops import compiled_summary; print(compiled_summary())"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if "is not to be had" in probe.stderr:
        pytest.skip(f"no {isa} here")
    assert f"in use: {isa}" in probe.stdout
    files = ["tests/ops/test_extension.py", "tests/golden"]
    numerical = "not instruction and not opcheck and not compile and not errors"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "-k", numerical]
    command = [sys.executable, "-m", "pytest", *options, *files]
    subprocess.run(command, env=environment, check=True)
