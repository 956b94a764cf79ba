"""The embedded engine: `transformers` generation with a KV cache, in the trainer's own process.

Every rank of a replica holds a whole copy of the model and generates a share of the replica's requests, which suits
models that fit beside the trainer many times over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    PretrainedConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_fipo.convert.modules import published_parameters
from megatron_fipo.parallel import interrupt
from megatron_fipo.parallel.device import nondeterministic_allowed
from megatron_fipo.rollout.protocol import Request, Response, Sampling
from megatron_fipo.rollout.sampler import SeededSampler

_PAD = 0  # any id: padded positions are masked, and what follows a stop token is cut off


class HFEngine:
    """Generates with a Hugging Face model whose weights come from `load_weights`; unusable before that."""

    through_first_rank = False

    def __init__(self, hf_config: PretrainedConfig, dtype: torch.dtype, device: torch.device, batch_size: int) -> None:
        self.batch_size = batch_size
        self.device = device
        self.model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype).to(device).eval()
        self._parameters = published_parameters(self.model)

    @torch.no_grad()
    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Copy every tensor into the model.

        Raises:
            ValueError: the tensors are not exactly the model's.
        """
        missing = set(self._parameters)
        for name, tensor in weights:
            if name not in self._parameters:
                raise ValueError(f"the rollout model has no parameter {name!r}")
            if tensor.shape != self._parameters[name].shape:
                wanted = list(self._parameters[name].shape)
                raise ValueError(f"{name} has shape {list(tensor.shape)}, but the rollout model's is {wanted}")
            self._parameters[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise ValueError(f"the rollout model got no weights for {', '.join(sorted(missing)[:5])}")

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        """Return one response a request, in order, `batch_size` at a time.

        Raises:
            Interrupted: this rank was asked to stop meanwhile.
        """
        responses: list[Response] = []
        with nondeterministic_allowed():  # top-p and the sampler add up probabilities along the vocabulary
            for start in range(0, len(requests), self.batch_size):
                responses += self._generate_batch(requests[start : start + self.batch_size], sampling)
        return responses

    def release(self) -> None:
        """Keep the model, which is small beside the trainer's."""

    def close(self) -> None:
        del self.model, self._parameters

    def _generate_batch(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        prompt_ids, attention_mask = _left_pad([r.prompt_ids for r in requests], self.device)
        width = prompt_ids.shape[1]
        sampler = SeededSampler([r.seed for r in requests], sampling.max_tokens, width, sampling.temperature == 0)
        tokens = self.model.generate(
            input_ids=prompt_ids,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([*_warpers(sampling), sampler]),
            stopping_criteria=StoppingCriteriaList([_WhenInterrupted()]),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_tokens,
                do_sample=False,  # the sampler leaves one token
                eos_token_id=list(sampling.stop_token_ids),
                pad_token_id=_PAD,
            ),
        )[:, width:].cpu()
        if interrupt.requested():
            raise interrupt.Interrupted
        log_probs = torch.stack(sampler.log_probs, dim=1)  # [B, generated]
        stops = torch.isin(tokens, torch.tensor(sampling.stop_token_ids))
        return [_cut(*row, sampling.max_tokens) for row in zip(tokens, log_probs, stops, strict=True)]


class _WhenInterrupted(StoppingCriteria):
    """Ends generation at the next token once this rank is asked to stop."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.full((len(input_ids),), interrupt.requested(), device=input_ids.device)


def _warpers(sampling: Sampling) -> list[object]:
    warpers: list[object] = []
    if sampling.temperature not in (0, 1):
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both `[B, longest prompt]` int64."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[_PAD] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids.to(device), mask.to(device)


def _cut(tokens: torch.Tensor, log_probs: torch.Tensor, stops: torch.Tensor, max_tokens: int) -> Response:
    """End a row after its first stop token."""
    positions = stops.nonzero()
    stopped = len(positions) > 0
    length = int(positions[0]) + 1 if stopped else min(len(tokens), max_tokens)
    return Response(tokens[:length].tolist(), log_probs[:length].tolist(), truncated=not stopped)
