"""The embedded engine: a `transformers` model with a KV cache, in the trainer's own process.

Every rank of a replica holds a whole copy of the model and generates a share of the replica's requests, which suits
models that fit beside the trainer many times over.

Letters: B requests of a batch, U different prompts among them, P tokens of the longest prompt, R rows (requests that
are still generated), V vocabulary, L expert layers, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from megatron_fipo.convert.modules import published_parameters
from megatron_fipo.parallel import interrupt
from megatron_fipo.parallel.device import nondeterministic_allowed
from megatron_fipo.rollout.attention import use_grouped_attention
from megatron_fipo.rollout.kv_cache import growing_cache
from megatron_fipo.rollout.protocol import Request, Response, Sampling
from megatron_fipo.rollout.routing import RoutingRecorder
from megatron_fipo.rollout.sampler import SeededSampler
from megatron_fipo.shapes.architecture import Architecture

_PAD = 0  # any id: padded positions are masked
_COMPACTED_BELOW = 0.75  # share of unfinished rows from which on the finished ones are taken out of the batch


class HFEngine:
    """Generates with a Hugging Face model whose weights come from `load_weights`; unusable before that."""

    through_first_rank = False

    def __init__(
        self,
        hf_config: PretrainedConfig,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int,
        routed: Architecture | None = None,
    ) -> None:
        """Make the model.

        Args:
            routed: of the model, where responses come with their routing.

        Raises:
            ValueError: its routing cannot be recorded.
        """
        self.batch_size = batch_size
        self.device = device
        self.model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype).to(device).eval()
        use_grouped_attention(self.model)
        self._recorder = RoutingRecorder(self.model, routed) if routed else None
        self.held_version = 0
        self._loads = 0
        self._parameters = published_parameters(self.model)

    @torch.no_grad()
    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Copy every tensor into the model.

        Raises:
            ValueError: the tensors are not exactly the model's.
        """
        self.held_version = 0  # until all are there
        self._loads += 1
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
        self.held_version = self._loads

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
        """Sample one token for all rows at a time; rows that have ended leave the batch now and then."""
        sampler = SeededSampler([r.seed for r in requests], sampling, self.device)
        batch = _Batch(self.model, requests, sampling.max_tokens, self.device, self._recorder)
        stops = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=self.device)
        tokens = torch.zeros(len(requests), sampling.max_tokens, dtype=torch.int64, device=self.device)
        log_probs = torch.zeros(tokens.shape, device=self.device)
        for step in range(sampling.max_tokens):
            if interrupt.requested():
                raise interrupt.Interrupted
            chosen, chosen_log_probs = sampler(batch.logits, step, batch.requests)
            tokens[batch.requests, step] = chosen
            log_probs[batch.requests, step] = chosen_log_probs
            batch.unfinished &= ~torch.isin(chosen, stops)
            left = int(batch.unfinished.sum())
            if left == 0 or step + 1 == sampling.max_tokens:
                break
            if left <= _COMPACTED_BELOW * len(chosen):
                chosen = chosen[batch.drop_finished()]
            batch.append(chosen)
        responses = _responses(tokens.cpu(), log_probs.cpu(), stops.cpu())
        if self._recorder is None:
            return responses
        lengths = [len(response.token_ids) for response in responses]
        return [replace(r, routing=rows) for r, rows in zip(responses, batch.routing(lengths), strict=True)]


class _Batch:
    """Rows that are generated together, with their KV cache. A prompt of several requests is computed once.

    Attributes:
        requests: `[R]` index of each row's request.
        unfinished: `[R]`; all True until the caller changes it.
        logits: `[R, V]` of the next token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        max_tokens: int,
        device: torch.device,
        recorder: RoutingRecorder | None,
    ) -> None:
        self._model = model
        self._recorder = recorder
        self._cache = growing_cache(model.config)
        numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(r.prompt_ids) for r in requests))}
        prompt_ids, prompt_mask = _left_pad(list(numbers), device)
        positions = (prompt_mask.cumsum(-1) - 1).clamp(min=0)
        logits = self._forward(prompt_ids, positions, prompt_mask)
        prompts = torch.tensor([numbers[tuple(r.prompt_ids)] for r in requests], device=device)
        if recorder is not None:
            experts = recorder.take().unflatten(0, prompt_ids.shape)  # [U, P, L, K]
            self._prompts_routing = [experts[number, prompt_mask[number].cpu()] for number in prompts.tolist()]
            self._tokens_routing: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each step: requests, [R, L, K]
        self.requests = torch.arange(len(requests), device=device)
        self.unfinished = torch.ones(len(requests), dtype=torch.bool, device=device)
        self.logits = logits[prompts]
        self._cache.batch_select_indices(prompts)
        self._positions = positions[prompts, -1:]  # [R, 1] of the newest token
        self._width = prompt_ids.shape[1]  # tokens with padding
        self._mask = torch.cat([prompt_mask[prompts], prompt_mask.new_ones(len(requests), max_tokens)], dim=1)

    def append(self, tokens: torch.Tensor) -> None:
        """Append one token to each row, `[R]`."""
        self._positions = self._positions + 1
        self._width += 1
        self.logits = self._forward(tokens.unsqueeze(1), self._positions, self._mask[:, : self._width])
        if self._recorder is not None:
            self._tokens_routing.append((self.requests.cpu(), self._recorder.take()))

    def routing(self, lengths: Sequence[int]) -> list[torch.Tensor]:
        """Return the routing of each request's prompt and of all but the last of its tokens, `[inputs, L, K]`.

        Args:
            lengths: tokens of the responses.
        """
        layers_and_experts = self._prompts_routing[0].shape[1:]
        tokens = self._prompts_routing[0].new_empty(len(lengths), len(self._tokens_routing), *layers_and_experts)
        for step, (requests, experts) in enumerate(self._tokens_routing):
            tokens[requests, step] = experts
        rows = zip(self._prompts_routing, tokens, lengths, strict=True)
        return [torch.cat([prompt, experts[: length - 1]]) for prompt, experts, length in rows]

    def drop_finished(self) -> torch.Tensor:
        """Keep the unfinished rows only; return their indices among the rows before."""
        kept = self.unfinished.nonzero().squeeze(1)
        self._cache.batch_select_indices(kept)
        self.requests, self.unfinished = self.requests[kept], self.unfinished[kept]
        self._positions, self._mask = self._positions[kept], self._mask[kept]
        return kept

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the logits behind the last token, `[rows, V]`."""
        output = self._model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]


def _left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids, int64, and attention mask, bool, both `[U, P]`."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[_PAD] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    return ids.to(device), mask.to(device)


def _responses(tokens: torch.Tensor, log_probs: torch.Tensor, stops: torch.Tensor) -> list[Response]:
    """Return `[B, max_tokens]` up to each row's first stop token; what lies behind it belongs to nothing."""
    is_stop = torch.isin(tokens, stops)
    stopped = is_stop.any(1)
    lengths = torch.where(stopped, is_stop.int().argmax(1) + 1, tokens.shape[1])
    return [
        Response(tokens[i, :length].tolist(), log_probs[i, :length].tolist(), truncated=not has_ended)
        for i, (length, has_ended) in enumerate(zip(lengths.tolist(), stopped.tolist(), strict=True))
    ]
