"""A policy small enough for servers on a laptop, and what transformers says of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2ForCausalLM

from tests.support.policies import tiny_qwen2

VOCABULARY = 250


def make_model(directory: Path, *, seed: int = 0, tied: bool = False) -> PreTrainedModel:
    """Random weights, float32, with heads of 32 dimensions, the fewest that vLLM's CPU kernels take."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 1024}
    model = Qwen2ForCausalLM(tiny_qwen2(**sizes, tie_word_embeddings=tied))
    model.save_pretrained(directory)
    return model.eval()


def load_model(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def weights_of(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield weights as the actor exports them: each published tensor once."""
    yield from ((name, parameter.detach()) for name, parameter in model.named_parameters())


@torch.no_grad()
def log_probs(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> torch.Tensor:
    """[response, V] log-probabilities from which each token of the response was drawn, by one pass without a cache."""
    ids = torch.tensor([[*prompt, *response]])
    return model(input_ids=ids[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :].float().log_softmax(-1)
