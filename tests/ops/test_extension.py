"""The compiled scan, the sharded form of the loss, and the ops as torch sees them. N: packed tokens, S: sequences."""

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch

from megatron_fipo.algorithm import fipo_loss
from megatron_fipo.config.loss import AGGREGATIONS
from megatron_fipo.ops import extension, future_kl
from megatron_fipo.ops.reference import future_kl_loop
from tests.ops.agreement import CONFIG, LENGTHS, exact_batch, run, widened

pytestmark = pytest.mark.skipif(not extension.is_built(), reason="the extension is not built")

OPS = torch.ops.megatron_fipo


# The scan and the sharded form


@pytest.mark.parametrize("half_life", [0.5, 32.0, 1e6])
@pytest.mark.parametrize("lengths", [LENGTHS, [131072], [50000, 3, 20000]])
def test_scan(half_life, lengths):
    """The scan is the loop that defines it, to 1e-6 of the largest |S|."""
    batch = exact_batch(lengths)
    log_ratio = batch.log_probs - batch.old_log_probs
    expected = future_kl_loop(log_ratio.double(), batch.loss_mask, batch.cu_seqlens, half_life)
    actual = future_kl(log_ratio, batch.loss_mask, batch.cu_seqlens, half_life)
    assert (actual - expected).abs().max() < 1e-6 * expected.abs().max()


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


# The ops as torch sees them


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
        (4, torch.tensor([0, 600, 495]), "must be non-decreasing"),
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
    with pytest.raises(ValueError, match=r"not available for torch\.float64 on cpu"):
        fipo_loss(*batch.inputs(), CONFIG, backend="compiled")
    assert fipo_loss(*batch.inputs(), CONFIG, backend="auto").loss_sum.dtype == torch.float64
    monkeypatch.setattr(extension, "_extension", None)
    with pytest.raises(ValueError, match="not built; the losses run in plain torch"):
        fipo_loss(*exact_batch(LENGTHS).inputs(), CONFIG, backend="compiled")
    assert fipo_loss(*exact_batch(LENGTHS).inputs(), CONFIG).num_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_instruction_sets(isa):
    """The numbers in these files and the golden vectors hold on every instruction set this machine has, when forced."""
    if "MEGATRON_FIPO_ISA" in os.environ:
        pytest.skip("one is forced already")
    environment = {**os.environ, "MEGATRON_FIPO_ISA": isa}
    probe = subprocess.run(
        [sys.executable, "-c", "from megatron_fipo.ops import compiled_summary; print(compiled_summary())"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if "is not available" in probe.stderr:
        pytest.skip(f"no {isa} here")
    assert f"in use: {isa}" in probe.stdout
    files = ["tests/ops/test_fused_loss.py", "tests/ops/test_extension.py", "tests/golden"]
    numerical = "not instruction and not opcheck and not compile and not errors"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "-k", numerical]
    command = [sys.executable, "-m", "pytest", *options, *files]
    subprocess.run(command, env=environment, check=True)
