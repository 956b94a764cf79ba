"""Real vLLM servers of a mixture of experts on the CPU: responses come with the experts that each token went to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_fipo.batching.background import PartialResponse
from megatron_fipo.convert.modules import published_parameters
from megatron_fipo.model.check import check_model
from megatron_fipo.rollout import Request, Sampling, VLLMEngine
from megatron_fipo.rollout.vllm import ServedModel, process
from megatron_fipo.rollout.vllm.client import ClientTimeouts
from tests.rollout.vllm.models import log_probs
from tests.support.families import make_checkpoint
from tests.support.policies import make_config

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

VOCABULARY = 149
SAMPLED = Sampling(1.0, 1.0, 0, 60, (17, 42))
PROMPT_TOKENS, RESPONSE_TOKENS = 350, 100
STEP_TOKENS = PROMPT_TOKENS + RESPONSE_TOKENS  # of all requests together; longer prompts are computed in parts
CACHE_TOKENS = 1024  # 2 layers x keys and values x 1 head x 32 numbers x 4 bytes: 512 bytes a token


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two policies of one shape, which vLLM's kernels for the CPU take."""
    shape = {"num_hidden_layers": 2, "head_dim": 32, "num_key_value_heads": 1, "moe_intermediate_size": 64}
    directory, paths = tmp_path_factory.mktemp("moe"), []
    for number in range(2):
        path = make_checkpoint(directory / str(number), "qwen3_moe", max_position_embeddings=1024, **shape)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gate.weight"):
                    parameter.copy_(parameter.flip(number))  # other routers
        model.save_pretrained(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def engine(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[VLLMEngine]:
    """One server, whose steps and cache are smaller than what it is asked for."""
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(process, "_CPU_BATCHED_TOKENS", 1)  # so that a step takes STEP_TOKENS
    config = make_config(
        models[0],
        run={"directory": str(tmp_path_factory.mktemp("run"))},
        data={"train": "unused", "max_prompt_tokens": PROMPT_TOKENS},
        rollout={
            "engine": "vllm",
            "max_response_tokens": RESPONSE_TOKENS,
            "server": {"kv_cache_gb": 512 * CACHE_TOKENS / 2**30, "max_num_seqs": 32, "verify_weights": 1},
        },
        moe={"routing_replay": "rollout"},
    )
    topology: Any = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    served = ServedModel(VOCABULARY, check_model(config))
    engine = VLLMEngine(config, topology, ClientTimeouts(deadline=600, wait=600, probe=5.0), served)
    try:
        yield engine
    finally:
        engine.close()
        monkeypatch.undo()
        dist.destroy_process_group()


def requests() -> list[Request]:
    """Prompts of 1 to 330 tokens, some of which begin alike, twice: more than one step and the cache take."""
    generator = torch.Generator().manual_seed(7)
    found = [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in (1, 40, 330)]
    found += [[*found[-1][:n], 1, 2, 3] for n in (140, 320)]
    return [Request(prompt, 1000 + i) for i, prompt in enumerate(found * 2)]


def weights_of(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield weights as the actor exports them."""
    yield from ((name, p.detach()) for name, p in published_parameters(model).items())


def chosen(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """The experts of all tokens but the last in a plain forward pass, `[inputs, L, K]`."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]]), output_router_logits=True).router_logits
    return torch.stack([x.softmax(-1).topk(2).indices for x in logits], dim=1)


def test_every_token_comes_with_its_experts(engine: VLLMEngine, models: list[Path]) -> None:
    """The same as in transformers, token by token: prompts that are computed in parts, or are in the cache of prefixes,
    and requests that are put back for want of cache; after each update of the weights, with the new ones."""
    wanted = requests()
    assert sum(len(r.prompt_ids) for r in wanted) > max(STEP_TOKENS, 1.5 * CACHE_TOKENS)  # so requests are preempted
    for path in reversed(models):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        engine.load_weights(weights_of(model))
        responses = engine.generate(wanted, SAMPLED)
        for request, response in zip(wanted, responses, strict=True):
            expected = chosen(model, [*request.prompt_ids, *response.token_ids])
            assert response.routing is not None
            assert response.routing.dtype == torch.int8
            assert torch.equal(response.routing.long(), expected)
            probs = log_probs(model, request.prompt_ids, response.token_ids)
            sampled = probs.gather(1, torch.tensor(response.token_ids)[:, None]).squeeze(1)
            torch.testing.assert_close(torch.tensor(response.log_probs), sampled, rtol=0, atol=1e-4)
        assert any(len(response.token_ids) == SAMPLED.max_tokens for response in responses)


def test_a_response_that_is_paused_and_goes_on(engine: VLLMEngine, models: list[Path]) -> None:
    """Each token keeps the experts of the weights that it was sampled with; the last one of the first part is computed
    with the weights of the second."""
    first, second = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in models)
    prompt, partial = requests()[2].prompt_ids, PartialResponse()
    endless = Sampling(1.0, 1.0, 0, RESPONSE_TOKENS, ())
    engine.load_weights(weights_of(first))
    future = engine.submit(Request(prompt, 1), endless)
    time.sleep(1)  # some tokens; any number of them will do
    engine.pause([future])
    partial.extend(future.result(), 0, RESPONSE_TOKENS)
    before = len(partial.tokens)
    engine.load_weights(weights_of(second))
    rest = Sampling(1.0, 1.0, 0, 20, ())
    partial.extend(engine.generate([Request([*prompt, *partial.tokens], 2)], rest)[0], 1, RESPONSE_TOKENS)
    tokens = [*prompt, *partial.tokens]
    cut = len(prompt) + max(before - 1, 0) if before else 0
    expected = torch.cat([chosen(first, tokens)[:cut], chosen(second, tokens)[cut:]])
    assert partial.routing is not None
    assert torch.equal(partial.routing.long(), expected)
    if before:
        assert not torch.equal(partial.routing.long(), chosen(second, tokens))
