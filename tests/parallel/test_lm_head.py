"""LM head, log-probability and entropy by chunks and by vocabulary shards, against the naive twin."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megatron_fipo.ops import logits
from megatron_fipo.parallel import lm_head
from megatron_fipo.parallel.lm_head import token_log_probs_and_entropy, token_log_probs_and_entropy_reference

ROWS, HIDDEN, VOCAB, PADDED = 37, 16, 101, 112
Case = tuple[Tensor, Tensor, Tensor]


def make_case(dtype: torch.dtype = torch.float32, rows: int = ROWS, vocab: int = VOCAB, padded: int = PADDED) -> Case:
    """hidden [R, H], weight [padded, H], targets [R] in [0, vocab); logits of standard deviation 2."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(padded, HIDDEN, generator=generator, dtype=torch.float64) * (2 / HIDDEN**0.5)
    targets = torch.randint(vocab, (rows,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def chunked(case: Case, **changes: Any) -> tuple[Tensor, Tensor]:
    options = {"vocab_start": 0, "vocab_size": VOCAB, "temperature": 1.0, "group": None} | changes
    return token_log_probs_and_entropy(*case, **({"chunk_tokens": 8, "fp32_logits": False} | options))


def row_weights(rows: int) -> tuple[Tensor, Tensor]:
    """Upstream gradients [R] of log_probs and of entropy: different in every row, both signs."""
    at = torch.arange(rows, dtype=torch.float32)
    return torch.cos(3 * at), torch.sin(1 + 2 * at)


def gradients(case: Case, outputs: tuple[Tensor, Tensor], use_entropy: bool = True) -> tuple[Tensor, Tensor]:
    of_log_probs, of_entropy = row_weights(case[0].shape[0])
    loss = (of_log_probs * outputs[0]).sum()
    if use_entropy:
        loss = loss + (of_entropy * outputs[1]).sum()
    return torch.autograd.grad(loss, case[:2])


@pytest.mark.parametrize("chunk_tokens", [1, 5, ROWS, 1000])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_values_and_gradients_equal_the_reference(temperature: float, chunk_tokens: int) -> None:
    """Both outputs and both gradients equal the naive twin's, whatever the chunk, with a padded vocabulary."""
    case = make_case()
    actual = chunked(case, temperature=temperature, chunk_tokens=chunk_tokens)
    expected = token_log_probs_and_entropy_reference(*case, vocab_size=VOCAB, temperature=temperature)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(case, actual), gradients(case, expected), atol=1e-5, rtol=1e-5)


def test_many_blocks_in_a_chunk_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Element-wise blocks of three rows and vocabulary blocks of ten give the result of whole chunks."""
    monkeypatch.setattr(logits, "_BLOCK_BYTES_CPU", 3 * 4 * VOCAB)
    monkeypatch.setattr(lm_head, "_VOCAB_BLOCK_ROWS", 10)
    case = make_case()
    actual, expected = chunked(case), token_log_probs_and_entropy_reference(*case, vocab_size=VOCAB, temperature=1.0)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients(case, actual), gradients(case, expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_gradcheck_in_float64(temperature: float) -> None:
    """A float64 head is computed in float64: analytic gradients of both outputs equal finite differences."""
    hidden, weight, targets = make_case(torch.float64, rows=5, vocab=9, padded=12)

    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return chunked((hidden, weight, targets), vocab_size=9, temperature=temperature, chunk_tokens=2)

    assert torch.autograd.gradcheck(outputs, (hidden, weight))


def test_uniform_logits_closed_form() -> None:
    """Zero hidden states give log-probability -log V and entropy log V over the true vocabulary only."""
    hidden, weight, targets = make_case()
    log_probs, entropy = chunked((torch.zeros_like(hidden), weight, targets))
    expected = torch.full((ROWS,), VOCAB, dtype=torch.float32).log()
    torch.testing.assert_close(log_probs, -expected)
    torch.testing.assert_close(entropy, expected)


def test_large_logits_stay_finite() -> None:
    """Logits of +-10^4 neither overflow nor give NaN in values and gradients."""
    hidden, weight, targets = make_case()
    case = ((hidden.detach() * 2e3).requires_grad_(), weight, targets)
    actual = chunked(case)
    expected = token_log_probs_and_entropy_reference(*case, vocab_size=VOCAB, temperature=1.0)
    torch.testing.assert_close(actual, expected, atol=1e-2, rtol=1e-5)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(case, actual))


def test_padding_is_excluded_exactly() -> None:
    """Whatever the padded rows hold, NaN included, outputs keep their bits and the rows' gradient is zero."""
    case = make_case()
    clean = chunked(case)
    with torch.no_grad():
        case[1][VOCAB:] = torch.nan
    actual = chunked(case)
    assert all(torch.equal(a, b) for a, b in zip(actual, clean, strict=True))
    grad_hidden, grad_weight = gradients(case, actual)
    assert torch.equal(grad_weight[VOCAB:], torch.zeros(PADDED - VOCAB, HIDDEN))
    assert torch.isfinite(grad_hidden).all()


def test_targets_outside_the_vocabulary_have_probability_zero() -> None:
    """A padded or negative target id gets log-probability -inf and leaves the other rows alone."""
    hidden, weight, targets = make_case()
    outside = targets.clone()
    outside[3], outside[4] = VOCAB, -1
    log_probs, expected = chunked((hidden, weight, outside))[0], chunked((hidden, weight, targets))[0].clone()
    expected[3:5] = -torch.inf
    assert torch.equal(log_probs, expected)


def test_no_rows() -> None:
    """R = 0 gives empty outputs and zero gradients."""
    case = make_case(rows=0)
    actual = chunked(case)
    assert [tuple(output.shape) for output in actual] == [(0,), (0,)]
    grad_hidden, grad_weight = gradients(case, actual)
    assert grad_hidden.shape == (0, HIDDEN)
    assert torch.equal(grad_weight, torch.zeros(PADDED, HIDDEN))


@pytest.mark.parametrize("output", [0, 1], ids=["log_probs", "entropy"])
def test_one_output_alone(output: int) -> None:
    """With only one of the two outputs in the loss, gradients are those of that output."""
    case = make_case()
    expected = token_log_probs_and_entropy_reference(*case, vocab_size=VOCAB, temperature=0.7)
    weights = row_weights(ROWS)[output]
    actual = torch.autograd.grad((weights * chunked(case, temperature=0.7)[output]).sum(), case[:2])
    torch.testing.assert_close(
        actual, torch.autograd.grad((weights * expected[output]).sum(), case[:2]), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient(frozen: int) -> None:
    """With one input frozen the other's gradient keeps its bits."""
    case = make_case()
    expected = gradients(case, chunked(case))[1 - frozen]
    case[frozen].requires_grad_(False)
    actual = torch.autograd.grad((torch.stack(chunked(case)) * torch.stack(row_weights(ROWS))).sum(), case[1 - frozen])
    assert torch.equal(actual[0], expected)


def test_recording_gradients_does_not_change_a_bit() -> None:
    """Outputs under no_grad and with gradients are bitwise equal."""
    case = make_case()
    recorded = chunked(case, temperature=0.7)
    with torch.no_grad():
        plain = chunked(case, temperature=0.7)
    assert all(torch.equal(a, b) for a, b in zip(recorded, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_memory_held_before_changes_nothing(dtype: torch.dtype) -> None:
    """With NaN in all memory that is allocated without being written, every bit is the same."""
    case = make_case(dtype, rows=300)
    settings: Any = torch.utils.deterministic
    results = []
    for fill in (False, True):
        torch.use_deterministic_algorithms(fill)
        settings.fill_uninitialized_memory = True
        try:
            outputs = chunked(case, chunk_tokens=128)
            results.append((*outputs, *gradients(case, outputs)))
        finally:
            torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("fp32_logits", [False, True])
def test_bfloat16_head(fp32_logits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bfloat16 head gives the reference of the same rounding: values to 1e-5, gradients to bfloat16's 2^-8."""
    monkeypatch.setattr(lm_head, "_VOCAB_BLOCK_ROWS", 10)
    case = make_case(torch.bfloat16)
    actual = chunked(case, temperature=0.7, fp32_logits=fp32_logits)
    expected = token_log_probs_and_entropy_reference(*case, vocab_size=VOCAB, temperature=0.7, fp32_logits=fp32_logits)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(gradients(case, actual), gradients(case, expected), strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine, theirs, atol=2**-8 * theirs.abs().max().item(), rtol=2**-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_goes_into_megatrons_buffer(dtype: torch.dtype) -> None:
    """A weight with a float32 main_grad has its gradient added there, unrounded, and gets none from autograd."""
    case, exact = make_case(dtype), make_case(torch.float64)
    expected = gradients(exact, chunked(exact))[1].float()
    case[1].main_grad = torch.ones(PADDED, HIDDEN)  # type: ignore[attr-defined]
    of_log_probs, of_entropy = row_weights(ROWS)
    for _ in range(2):
        log_probs, entropy = chunked(case)
        ((of_log_probs * log_probs).sum() + (of_entropy * entropy).sum()).backward()
    assert case[1].grad is None
    assert case[1].grad_added_to_main_grad  # type: ignore[attr-defined]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7 * expected.abs().max().item()}[dtype]
    torch.testing.assert_close(case[1].main_grad, 1 + 2 * expected, atol=2 * tolerance, rtol=1e-5)  # type: ignore[attr-defined]


def test_wrong_arguments_are_named() -> None:
    """Shapes that do not fit and settings out of range raise ValueError with the numbers in it."""
    hidden, weight, targets = make_case()
    with pytest.raises(ValueError, match=r"\[37, 16\].*\[112, 15\]"):
        chunked((hidden, weight[:, 1:], targets))
    with pytest.raises(ValueError, match=r"\[36\]"):
        chunked((hidden, weight, targets[1:]))
    with pytest.raises(ValueError, match="temperature 0"):
        chunked((hidden, weight, targets), temperature=0)


def _run_rank(rank: int, ranks: int, directory: str) -> None:
    """One tensor-parallel rank: its shard of the case, gradients of `hidden` summed as a caller does."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{directory}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    try:
        hidden, weight, targets = make_case(padded=ranks * 64)  # the last of four shards is wholly padding
        shard = weight.detach()[rank * 64 : (rank + 1) * 64].clone().requires_grad_()
        case = (hidden, shard, targets)
        outputs = chunked(case, vocab_start=rank * 64, temperature=0.7, group=dist.group.WORLD)
        grad_hidden, grad_weight = gradients(case, outputs)
        dist.all_reduce(grad_hidden)
        empty = chunked((hidden[:0], shard, targets[:0]), vocab_start=rank * 64, group=dist.group.WORLD)
        assert empty[0].shape == (0,)
        outputs = tuple(output.detach() for output in outputs)
        torch.save((*outputs, grad_hidden, grad_weight), f"{directory}/rank_{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks", [2, 4])
def test_vocabulary_shards_equal_one_process(ranks: int, tmp_path: Path) -> None:
    """Over 2 and 4 ranks, wholly padded shards included, every rank has the unsplit outputs and its gradients."""
    mp.start_processes(_run_rank, args=(ranks, str(tmp_path)), nprocs=ranks, start_method="fork")
    case = make_case(padded=ranks * 64)
    expected = token_log_probs_and_entropy_reference(*case, vocab_size=VOCAB, temperature=0.7)
    grad_hidden, grad_weight = gradients(case, expected)
    for rank in range(ranks):
        actual = torch.load(tmp_path / f"rank_{rank}.pt")
        shard = grad_weight[rank * 64 : (rank + 1) * 64]
        torch.testing.assert_close(actual, (*expected, grad_hidden, shard), atol=1e-5, rtol=1e-5)
