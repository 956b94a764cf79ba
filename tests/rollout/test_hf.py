"""The embedded engine: what it draws, with which probability, and what it reports of it."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from megatron_fipo.convert.modules import published_parameters
from megatron_fipo.model.architecture import architecture
from megatron_fipo.parallel import interrupt
from megatron_fipo.rollout import HFEngine, Request, Response, Sampling, hf
from megatron_fipo.shapes.architecture import Architecture
from tests.support.families import make_checkpoint
from tests.support.policies import make_qwen2

Weights = Iterator[tuple[str, torch.Tensor]]
STOP = (17, 42)
PROMPTS = [(3, 1, 4, 1, 5), (9,), (2, 6, 5), (3, 5, 8, 9, 7, 9, 3)]


def sampling(**changes: object) -> Sampling:
    values = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 16, "stop_token_ids": STOP} | changes
    return Sampling(**values)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads are slower than one on a model of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    path = make_qwen2(tmp_path_factory.mktemp("qwen2"), layers=2, vocab=50)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def engine_for(model: PreTrainedModel, batch_size: int = 64, routed: Architecture | None = None) -> HFEngine:
    engine = HFEngine(model.config, torch.float32, torch.device("cpu"), batch_size, routed)
    engine.load_weights((name, p.detach()) for name, p in published_parameters(model).items())
    return engine


@pytest.fixture(scope="module")
def engine(model: PreTrainedModel) -> HFEngine:
    return engine_for(model)


def requests(count: int) -> list[Request]:
    return [Request(PROMPTS[i % len(PROMPTS)], seed=1000 + i) for i in range(count)]


@torch.no_grad()
def logits_of(model: PreTrainedModel, request: Request, response: Response) -> torch.Tensor:
    """[response, V] logits that each token of the response was drawn from, without cache or padding."""
    ids = torch.tensor([[*request.prompt_ids, *response.token_ids]])
    return model(input_ids=ids[:, :-1], use_cache=False).logits[0, len(request.prompt_ids) - 1 :]


def filtered(logits: torch.Tensor, how: Sampling) -> torch.Tensor:
    """log-probabilities [T, V] after temperature, top-k and top-p, by their definitions; -inf where nothing is left."""
    probs = (logits / how.temperature).softmax(-1)
    for row in probs:
        order = row.argsort(descending=True)
        if how.top_k:
            row[order[how.top_k :]] = 0
        row /= row.sum()
        before = row[order].cumsum(0) - row[order]  # mass of more likely tokens
        row[order[before >= how.top_p]] = 0
        row /= row.sum()
    return probs.log()


@torch.no_grad()
def plain_response(model: PreTrainedModel, request: Request, how: Sampling) -> Response:
    """Sample a response by full forward passes of its tokens alone, without a cache, padding or other rows."""
    uniforms = torch.rand(how.max_tokens, generator=torch.Generator().manual_seed(request.seed)).double()
    tokens: list[int] = []
    log_probs: list[float] = []
    while len(tokens) < how.max_tokens and not set(tokens) & set(how.stop_token_ids):
        logits = model(input_ids=torch.tensor([[*request.prompt_ids, *tokens]]), use_cache=False).logits[0, -1:]
        log_p = (filtered(logits, how) if how.temperature else logits.log_softmax(-1))[0]
        sums = log_p.double().exp().cumsum(0)
        above = (sums > uniforms[len(tokens)] * sums[-1]).nonzero()
        tokens.append(int(above[0]) if how.temperature else int(log_p.argmax()))
        log_probs.append(float(log_p[tokens[-1]]))
    return Response(tokens, log_probs, truncated=not set(tokens) & set(how.stop_token_ids))


SLIDING = {
    "mistral_window": ("mistral", {"sliding_window": 5}),
    "qwen2_mixed": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
}


@pytest.mark.parametrize("name", ["qwen2_tied", "qwen3", "llama3", "qwen3_moe", "mixtral", *SLIDING])
def test_responses_are_those_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    """Every family's tokens, stops and log-probabilities are those of transformers' full forward passes, one response
    alone; sliding windows shorter than the responses included."""
    family, changes = SLIDING.get(name, (name, {}))
    path = make_checkpoint(tmp_path, family, num_hidden_layers=2, **changes)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    engine = engine_for(plain)
    wanted = requests(12)
    assert [tuple(r.prompt_ids) for r in wanted].count(PROMPTS[0]) == 3
    lengths = set()
    plain_sampling = sampling(stop_token_ids=tuple(range(5, 60, 6)))
    filtered_sampling = dataclasses.replace(plain_sampling, temperature=0.8, top_p=0.9, top_k=30)
    for how in (plain_sampling, filtered_sampling, dataclasses.replace(plain_sampling, temperature=0.0)):
        responses = engine.generate(wanted, how)
        for request, response in zip(wanted, responses, strict=True):
            expected = plain_response(plain, request, how)
            assert (response.token_ids, response.truncated) == (expected.token_ids, expected.truncated)
            assert response.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
            lengths.add(len(response.token_ids))
    assert len(lengths) > 3


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_routing_is_that_of_a_plain_forward_pass(name: str, tmp_path: Path) -> None:
    """The choice of each token of prompt and response but the last, for short and long responses of one batch."""
    path = make_checkpoint(tmp_path, name, num_hidden_layers=2)
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    engine = engine_for(plain, routed=architecture(plain.config))
    wanted = requests(12)
    responses = engine.generate(wanted, sampling(stop_token_ids=tuple(range(5, 60, 6))))
    for request, response in zip(wanted, responses, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *response.token_ids]])
        with torch.no_grad():
            logits = plain(input_ids=ids[:, :-1], output_router_logits=True).router_logits
        expected = torch.stack([layer.softmax(-1).topk(2).indices for layer in logits], dim=1)
        assert response.routing is not None
        assert response.routing.dtype == torch.int8
        assert torch.equal(response.routing.long(), expected)
    assert len({len(response.token_ids) for response in responses}) > 3


def test_a_model_without_routers_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    """Rather than responses without routing."""
    routed = architecture(AutoConfig.from_pretrained(make_checkpoint(tmp_path, "qwen3_moe", num_hidden_layers=2)))
    with pytest.raises(ValueError, match="Qwen2ForCausalLM has 0 routers that are known, but 2 layers"):
        engine_for(model, routed=routed)


def rows_of_forwards(engine: HFEngine) -> list[tuple[int, int]]:
    """Record rows and tokens of each forward pass of the engine's model from now on."""
    seen: list[tuple[int, int]] = []

    def record(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append(tuple(kwargs["input_ids"].shape))  # type: ignore[arg-type]

    engine.model.register_forward_pre_hook(record, with_kwargs=True)
    return seen


def test_finished_rows_leave_the_batch(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every token at least three quarters of the computed rows are unfinished, and the responses are those of a
    batch that no row leaves, and of one that each row leaves at once."""
    engine = engine_for(model)
    seen = rows_of_forwards(engine)
    responses = engine.generate(requests(64), sampling(max_tokens=48))
    lengths = [len(r.token_ids) for r in responses]
    unfinished = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    rows = [rows for rows, _ in seen[1:]]
    assert len(rows) == len(unfinished)
    assert all(left <= computed < left / 0.75 for computed, left in zip(rows, unfinished, strict=True))
    assert min(rows) < 16
    for share, expected in ((0.0, [64] * len(rows)), (1.0, unfinished)):
        monkeypatch.setattr(hf, "_COMPACTED_BELOW", share)
        seen.clear()
        others = engine.generate(requests(64), sampling(max_tokens=48))
        assert [rows for rows, _ in seen[1:]] == expected
        for response, other in zip(responses, others, strict=True):
            assert (response.token_ids, response.truncated) == (other.token_ids, other.truncated)
            assert response.log_probs == pytest.approx(other.log_probs, abs=1e-5)


def test_a_prompt_is_computed_once(engine: HFEngine) -> None:
    """The prompts of 32 requests, 4 different ones of up to 7 tokens, are one pass over 4 rows of 7."""
    seen = rows_of_forwards(engine)
    engine.generate(requests(32), sampling())
    assert seen[:2] == [(4, 7), (32, 1)]


def test_held_version(model: PreTrainedModel) -> None:
    """It counts loads, and is 0 before the first one and after one that failed."""
    engine = HFEngine(model.config, torch.float32, torch.device("cpu"), 4)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    assert engine.held_version == 0
    for version in (1, 2):
        engine.load_weights(iter(weights.items()))
        assert engine.held_version == version
    with pytest.raises(ValueError, match="no weights for lm_head"):
        engine.load_weights(_without_last(weights))
    assert engine.held_version == 0
    engine.load_weights(iter(weights.items()))
    assert engine.held_version == 4


def test_logits_that_are_not_finite_are_refused(model: PreTrainedModel) -> None:
    """A diverged model ends with an error, greedy or not, rather than with a token."""
    engine = engine_for(model)
    engine.load_weights((name, torch.full_like(p, torch.nan)) for name, p in model.named_parameters())
    for how in (sampling(), sampling(temperature=0)):
        with pytest.raises(FloatingPointError, match="not finite"):
            engine.generate(requests(2), how)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_seed_is_a_response(model: PreTrainedModel, engine: HFEngine, batch_size: int) -> None:
    """A request's response is the same in any batch size, order and company."""
    wanted = requests(20)
    expected = engine.generate(wanted, sampling())
    assert len({tuple(r.token_ids) for r in expected}) == 20
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = engine_for(model, batch_size).generate([wanted[i] for i in order], sampling())
    for place, i in enumerate(order):
        assert shuffled[place].token_ids == expected[i].token_ids
        assert shuffled[place].log_probs == pytest.approx(expected[i].log_probs, abs=1e-5)


@pytest.mark.parametrize(
    "how",
    [sampling(), sampling(temperature=0.6), sampling(top_k=5), sampling(temperature=1.3, top_p=0.7, top_k=20)],
    ids=["plain", "temperature", "top_k", "all"],
)
def test_log_probs_are_of_the_sampled_distribution(model: PreTrainedModel, engine: HFEngine, how: Sampling) -> None:
    """log_probs are transformers' after temperature, top-k and top-p; nothing outside of those is drawn."""
    wanted = requests(8)
    for request, response in zip(wanted, engine.generate(wanted, how), strict=True):
        log_p = filtered(logits_of(model, request, response), how)
        expected = log_p.gather(1, torch.tensor(response.token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(response.log_probs), expected, rtol=0, atol=1e-4)


def test_greedy_equals_transformers(model: PreTrainedModel, engine: HFEngine) -> None:
    """Temperature 0 gives transformers' greedy continuation of each prompt alone, whatever the seed."""
    for request, response in zip(requests(8), engine.generate(requests(8), sampling(temperature=0)), strict=True):
        ids = torch.tensor([request.prompt_ids])
        expected = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=list(STOP))
        assert response.token_ids == expected[0, ids.shape[1] :].tolist()


def test_stop_tokens_end_a_response(engine: HFEngine) -> None:
    """Every stop id ends a response and is its last token; only a response without one is truncated, at max_tokens."""
    responses = engine.generate(requests(64), sampling())
    assert {r.token_ids[-1] for r in responses if not r.truncated} == set(STOP)
    assert any(r.truncated for r in responses)
    for response in responses:
        assert len(response.log_probs) == len(response.token_ids)
        assert not set(response.token_ids[:-1]) & set(STOP)
        assert response.truncated == (response.token_ids[-1] not in STOP)
        assert len(response.token_ids) == 16 if response.truncated else len(response.token_ids) <= 16


def test_stop_at_the_limit_is_not_truncated(engine: HFEngine) -> None:
    """A stop token drawn as the very last allowed token counts as an end."""
    pairs = zip(requests(64), engine.generate(requests(64), sampling()), strict=True)
    request, whole = next((q, r) for q, r in pairs if not r.truncated and len(r.token_ids) > 1)
    length = len(whole.token_ids)
    (at_limit,) = engine.generate([request], sampling(max_tokens=length))
    (below,) = engine.generate([request], sampling(max_tokens=length - 1))
    assert (at_limit.token_ids, at_limit.truncated) == (whole.token_ids, False)
    assert (below.token_ids, below.truncated) == (whole.token_ids[:-1], True)


@pytest.mark.parametrize("how", [sampling(max_tokens=1), sampling(max_tokens=1, temperature=0.8, top_p=0.9)])
def test_frequencies_match_the_distribution(model: PreTrainedModel, how: Sampling) -> None:
    """First tokens of 4000 seeds follow the filtered distribution: chi-square below its 99.9 % quantile."""
    count, prompt = 4000, PROMPTS[0]
    responses = engine_for(model, 1000).generate([Request(prompt, seed) for seed in range(count)], how)
    probs = filtered(logits_of(model, Request(prompt, 0), responses[0]), how)[0].exp()
    observed = torch.bincount(torch.tensor([r.token_ids[0] for r in responses]), minlength=probs.numel())
    assert observed[probs == 0].sum() == 0
    common = probs * count >= 5
    expected = torch.cat([probs[common], probs[~common].sum()[None]]) * count
    counts = torch.cat([observed[common], observed[~common].sum()[None]])
    used = expected > 1
    statistic = float(((counts - expected).square() / expected)[used].sum())
    freedom = int(used.sum()) - 1
    assert freedom >= 10
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3  # Wilson and Hilferty
    assert statistic < quantile


def test_new_weights_change_the_answers(model: PreTrainedModel, tmp_path: Path) -> None:
    """After load_weights the engine answers as the new model does, and as the old one after going back."""
    other = AutoModelForCausalLM.from_pretrained(make_qwen2(tmp_path, layers=2, vocab=50, seed=1), dtype=torch.float32)
    engine = engine_for(model)
    old = engine.generate(requests(8), sampling())
    engine.load_weights((name, p.detach()) for name, p in other.named_parameters())
    new = engine.generate(requests(8), sampling())
    assert new == engine_for(other).generate(requests(8), sampling())
    assert new != old
    engine.load_weights((name, p.detach()) for name, p in model.named_parameters())
    assert engine.generate(requests(8), sampling()) == old


def test_tied_embeddings_need_no_head(tmp_path: Path) -> None:
    """A tied model takes its embedding once."""
    path = make_qwen2(tmp_path, layers=2, vocab=50, tied=True)
    tied = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    engine = HFEngine(AutoConfig.from_pretrained(path), torch.float32, torch.device("cpu"), 8)
    engine.load_weights((name, p.detach()) for name, p in tied.named_parameters())
    wanted = requests(2)
    for request, response in zip(wanted, engine.generate(wanted, sampling()), strict=True):
        log_p = filtered(logits_of(tied, request, response), sampling())
        expected = log_p.gather(1, torch.tensor(response.token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(response.log_probs), expected, rtol=0, atol=1e-4)


def test_generates_under_deterministic_algorithms(engine: HFEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cumulative sum has no deterministic form on CUDA and raises there: generation does without, and only it."""
    how = sampling(top_p=0.7)
    expected = engine.generate(requests(4), how)
    exact = torch.Tensor.cumsum

    def as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.is_floating_point() and torch.are_deterministic_algorithms_enabled():
            raise RuntimeError("cumsum does not have a deterministic implementation")
        return exact(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "cumsum", as_on_cuda)
    torch.use_deterministic_algorithms(True)
    try:
        assert engine.generate(requests(4), how) == expected
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_to_generate(engine: HFEngine) -> None:
    """No request, no response."""
    assert engine.generate([], sampling()) == []


def _without_last(weights: dict[str, torch.Tensor]) -> Weights:
    yield from list(weights.items())[:-1]


def _with_stranger(weights: dict[str, torch.Tensor]) -> Weights:
    yield from weights.items()
    yield "model.layers.9.mlp.up_proj.weight", torch.zeros(1)


def _with_wrong_shape(weights: dict[str, torch.Tensor]) -> Weights:
    yield from (weights | {"model.norm.weight": torch.ones(1)}).items()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (_without_last, "no weights for lm_head.weight"),
        (_with_stranger, "no parameter 'model.layers.9"),
        (_with_wrong_shape, r"model\.norm\.weight.*\[1\].*\[64\]"),
    ],
)
def test_load_weights_errors(model: PreTrainedModel, broken: object, message: str) -> None:
    """A missing, an unknown and a misshapen tensor are refused by name."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        engine_for(model).load_weights(broken(weights))  # type: ignore[operator]


def test_asked_to_stop(engine: HFEngine) -> None:
    """Generation ends at the next token and gives nothing, rather than responses that were cut."""
    interrupt.install()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(interrupt.Interrupted):
            engine.generate(requests(2), sampling(max_tokens=100_000))
    finally:
        interrupt.install()
        for number in interrupt.SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    assert len(engine.generate(requests(2), sampling())) == 2
