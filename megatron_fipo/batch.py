"""Data of a training step: responses as packed tensors, and their packing into micro-batches.

Letters: B responses, N tokens (prompt and response, one sequence after another), S sequences of a micro-batch,
R response positions of a micro-batch (each sequence from its first to its last response token), C context-parallel
ranks, L expert layers, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

_OUTCOMES = ("rewards", "accuracy", "advantages", "scores", "failures")
PER_SEQUENCE = ("ids", "prompt_lengths", "lengths", "truncated", *_OUTCOMES)
FAILURES = (None, "timeout", "error")  # of a verifier
PER_TOKEN = ("tokens", "loss_mask", "rollout_log_probs", "weight_versions", "routing")
NO_EXPERT = -1  # of a token without routing


@dataclass(frozen=True)
class Rollouts:
    """B responses with their prompts, packed.

    Attributes:
        ids: [B] int64, unique over the step and its replicas: group number * group size + number in the group.
        prompt_lengths: [B] int64 tokens.
        lengths: [B] int64 tokens of prompt and response.
        truncated: [B] bool, the response hit the length limit.
        rewards, accuracy, advantages: [B] float32, zero until they are computed.
        scores: [B] float32, rewards before the penalty for length.
        failures: [B] int8, why the verifier could not decide: an index into `FAILURES`.
        tokens: [N] int64.
        loss_mask: [N] bool, the tokens that the policy is trained on: sampled ones, stop token included.
        rollout_log_probs: [N] float32, the engine's log-probability of each sampled token; 0 elsewhere.
        weight_versions: [N] int32, of the policy that sampled each token: finished training steps; -1 elsewhere.
        routing: [N, L, K] int8 or int16 (`routing_dtype`), the experts that the engine computed each token with;
            `NO_EXPERT` for a sequence's last token, which is no input. [N, 0, 0] where the engine does not return them.
    """

    ids: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor
    truncated: torch.Tensor
    rewards: torch.Tensor
    accuracy: torch.Tensor
    advantages: torch.Tensor
    scores: torch.Tensor
    failures: torch.Tensor
    tokens: torch.Tensor
    loss_mask: torch.Tensor
    rollout_log_probs: torch.Tensor
    weight_versions: torch.Tensor
    routing: torch.Tensor

    def __len__(self) -> int:
        return self.ids.numel()

    @staticmethod
    def from_state_dict(state: Mapping[str, torch.Tensor]) -> Rollouts:
        """Rebuild from `vars`, also of a release without scores, failures or routing: its scores are the accuracies."""
        added = {
            "scores": state["accuracy"],
            "failures": torch.zeros_like(state["ids"], dtype=torch.int8),
            "routing": _no_routing(len(state["tokens"])),
        }
        return Rollouts(**{**added, **state})

    @property
    def offsets(self) -> torch.Tensor:
        """[B + 1] int64 start of each sequence in the packed tokens."""
        return torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)])

    @property
    def response_lengths(self) -> torch.Tensor:
        return self.lengths - self.prompt_lengths

    def response_tokens(self) -> list[torch.Tensor]:
        """B tensors `[response length]` int64."""
        sequences = self.tokens.split(self.lengths.tolist())
        return [s[p:] for s, p in zip(sequences, self.prompt_lengths.tolist(), strict=True)]

    def select(self, index: torch.Tensor) -> Rollouts:
        """Return the responses at `index` ([K] int64), in that order."""
        starts, lengths = self.offsets[:-1][index], self.lengths[index]
        token_index = torch.repeat_interleave(starts - (lengths.cumsum(0) - lengths), lengths) + torch.arange(
            int(lengths.sum())
        )
        chosen = {name: getattr(self, name)[index] for name in PER_SEQUENCE}
        return Rollouts(**chosen, **{name: getattr(self, name)[token_index] for name in PER_TOKEN})

    def replace(self, **changes: torch.Tensor) -> Rollouts:
        return replace(self, **changes)

    @staticmethod
    def concatenate(parts: Sequence[Rollouts]) -> Rollouts:
        columns = {f.name: [getattr(p, f.name) for p in parts] for f in fields(Rollouts)}
        columns["routing"] = _alike(columns["routing"])
        return Rollouts(**{name: torch.cat(values) for name, values in columns.items()})

    @staticmethod
    def from_responses(
        ids: Sequence[int],
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        log_probs: Sequence[Sequence[float]],
        truncated: Sequence[bool],
        weight_versions: Sequence[Sequence[int]] | int = 0,
        routing: Sequence[torch.Tensor | None] | None = None,
    ) -> Rollouts:
        """Pack sampled responses; every response token is trained on, no prompt token is.

        Args:
            weight_versions: of each response token, or one for all of them.
            routing: of each response, `[tokens of prompt and response - 1, L, K]` int8 or int16; None: not known.

        Raises:
            ValueError: a response has routing for another number of tokens.
        """
        prompt_lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int64)
        lengths = prompt_lengths + torch.tensor([len(r) for r in responses], dtype=torch.int64)
        if isinstance(weight_versions, int):
            weight_versions = [[weight_versions] * len(r) for r in responses]
        tokens, mask, log_prob, version = [], [], [], []
        for prompt, response, log_p, drawn_by in zip(prompts, responses, log_probs, weight_versions, strict=True):
            tokens += [*prompt, *response]
            mask += [False] * len(prompt) + [True] * len(response)
            log_prob += [0.0] * len(prompt) + list(log_p)
            version += [-1] * len(prompt) + list(drawn_by)
        return Rollouts(
            ids=torch.tensor(ids, dtype=torch.int64),
            prompt_lengths=prompt_lengths,
            lengths=lengths,
            truncated=torch.tensor(truncated, dtype=torch.bool),
            rewards=torch.zeros(len(ids)),
            accuracy=torch.zeros(len(ids)),
            advantages=torch.zeros(len(ids)),
            scores=torch.zeros(len(ids)),
            failures=torch.zeros(len(ids), dtype=torch.int8),
            tokens=torch.tensor(tokens, dtype=torch.int64),
            loss_mask=torch.tensor(mask, dtype=torch.bool),
            rollout_log_probs=torch.tensor(log_prob, dtype=torch.float32),
            weight_versions=torch.tensor(version, dtype=torch.int32),
            routing=_routing_of(ids, lengths.tolist(), routing),
        )


def routing_dtype(experts: int) -> torch.dtype:
    """Return the smallest signed type that holds the number of an expert, and `NO_EXPERT`."""
    return torch.int8 if experts <= 128 else torch.int16


def _no_routing(tokens: int) -> torch.Tensor:
    return torch.zeros(tokens, 0, 0, dtype=torch.int8)


def _routing_of(
    ids: Sequence[int], lengths: Sequence[int], routing: Sequence[torch.Tensor | None] | None
) -> torch.Tensor:
    """Return the packed routing of responses: what is not known is `NO_EXPERT`, or of no layer if nothing is known."""
    last = torch.full((1, 1, 1), NO_EXPERT, dtype=torch.int8)
    parts = []
    for i, length, rows in zip(ids, lengths, routing or [None] * len(lengths), strict=True):
        if rows is None:
            parts.append(_no_routing(length))
        elif len(rows) != length - 1:
            raise ValueError(
                f"response {i} has the routing of {len(rows)} tokens, but {length - 1} of its {length} are inputs"
            )
        else:
            parts.append(torch.cat([rows, last.to(rows.dtype).expand(1, *rows.shape[1:])]))
    return torch.cat(_alike([_no_routing(0), *parts]))


def _alike(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return routing of the same layers: parts without any get those of the others, with `NO_EXPERT`."""
    known = next((p for p in parts if p.shape[1]), None)
    if known is None:
        return list(parts)
    return [p if p.shape[1] else known.new_full((len(p), *known.shape[1:]), NO_EXPERT) for p in parts]


@dataclass(frozen=True)
class MicroBatch:
    """Sequences packed for one forward pass, as one context-parallel rank sees them.

    Model inputs (this context-parallel rank's share, padded):
        input_ids, position_ids: [N / C] int64; a sequence's last token is no input, since it predicts nothing.
        is_padding: [N / C] bool.
        cu_seqlens: [S + 1] int32, whole padded sequences, over all context-parallel ranks.
        padded_lengths: S tokens of each padded sequence, as numbers of the host: reading them waits for no device.
        hidden_index: [R_local] int64, positions whose hidden state predicts a response token.
        targets: [R_local] int64, those response tokens.
        response_index: [R_local] int64, their indices among the R response positions.
        segment_offsets: [S * K + 1] int64, the chunks of responses among the R_local positions: K = 1, or 2 where
            context parallelism gives each rank two chunks of a sequence.
    Loss inputs (whole, the same on every rank of a replica):
        loss_mask: [R] bool; response_offsets: [S + 1] int64; advantages: [S] float32.
        rollout_log_probs, old_log_probs, reference_log_probs: [R] float32; token_weights: [R] float32 or None.
        influence_weights: [R] float32, permuted ones (`algorithm.influence=placebo`) or None.
        sequence_index: [S] int64, rows of the replica's Rollouts.
    Of mixtures of experts, or None:
        routing: experts to compute with (`moe.routing_replay`), of each model chunk of this rank, [its expert layers,
            its tokens here, K] int8 or int16; as `pack` makes it, of all layers in one.
        expert_load: of each of these chunks, [expert layers, experts] float32: tokens of the whole mini-batch that each
            expert was given when the old log-probabilities were computed, over those of an even distribution.
        aux_loss_weight: `moe.aux_loss`, as the weight of one token in the loss's sum (`actor.routing`).
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    is_padding: torch.Tensor
    cu_seqlens: torch.Tensor
    padded_lengths: tuple[int, ...]
    hidden_index: torch.Tensor
    targets: torch.Tensor
    response_index: torch.Tensor
    segment_offsets: torch.Tensor
    loss_mask: torch.Tensor
    response_offsets: torch.Tensor
    advantages: torch.Tensor
    sequence_index: torch.Tensor
    rollout_log_probs: torch.Tensor
    old_log_probs: torch.Tensor | None = None
    reference_log_probs: torch.Tensor | None = None
    token_weights: torch.Tensor | None = None
    influence_weights: torch.Tensor | None = None
    routing: tuple[torch.Tensor, ...] | None = None
    expert_load: tuple[torch.Tensor, ...] | None = None
    aux_loss_weight: float = 0.0

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest padded sequence."""
        return max(self.padded_lengths)

    @property
    def num_response_positions(self) -> int:
        return self.loss_mask.numel()

    def replace(self, **changes: Any) -> MicroBatch:
        return replace(self, **changes)

    def to(self, device: torch.device) -> MicroBatch:
        """Return it on the device, without a wait for a GPU: copies are queued, from pinned memory.

        torch reuses a pinned block only after the copies from it have ended.
        """
        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), torch.Tensor)}
        routing = self.routing and tuple(_moved(tensor, device) for tensor in self.routing)
        return self.replace(routing=routing, **{name: _moved(tensor, device) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class TrainBatch:
    """One mini-batch (one optimizer update) of this replica: the same number of micro-batches on every rank."""

    micro_batches: tuple[MicroBatch, ...]

    def with_token_values(self, **values: Sequence[torch.Tensor]) -> TrainBatch:
        """Return a copy whose micro-batches have the given per-token tensors, e.g. `old_log_probs=[...]`."""
        columns = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
        return TrainBatch(tuple(m.replace(**c) for m, c in zip(self.micro_batches, columns, strict=True)))

    def without_routing(self) -> TrainBatch:
        """Return a copy whose routers choose."""
        return TrainBatch(tuple(m.replace(routing=None) for m in self.micro_batches))


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def zigzag_positions(length: int, size: int, rank: int) -> torch.Tensor:
    """Positions inside one sequence that `rank` of `size` context-parallel ranks holds, `[length / size]` int64.

    A sequence is cut into 2 * size chunks; rank r holds chunks r and 2 * size - 1 - r, so that causal attention
    costs every rank the same.

    Raises:
        ValueError: the length is not a multiple of 2 * size.
    """
    if size == 1:
        return torch.arange(length)
    if length % (2 * size):
        raise ValueError(f"a sequence of {length} tokens cannot be split into 2 x {size} context-parallel chunks")
    chunk = length // (2 * size)
    offsets = torch.arange(chunk)
    return torch.cat([offsets + rank * chunk, offsets + (2 * size - 1 - rank) * chunk])


def pack(
    rollouts: Rollouts,
    index: Sequence[int],
    *,
    alignment: int = 1,
    context_size: int = 1,
    context_rank: int = 0,
) -> MicroBatch:
    """Pack the sequences at `index` into one micro-batch; an empty index gives a padding-only one.

    Every sequence is padded to a multiple of `alignment`; padding follows the sequence, so causal attention
    ignores it.

    Raises:
        ValueError: the rollouts have routing, but not of every input token.
    """
    chosen = rollouts.select(torch.tensor(list(index), dtype=torch.int64))
    inputs, positions, padding, hidden, targets, response_index, padded = [], [], [], [], [], [], []
    segments: list[int] = []
    chunks = 1 if context_size == 1 else 2
    local_start = response_start = 0
    prompts = chosen.prompt_lengths.tolist()
    for sequence, prompt in zip(chosen.tokens.split(chosen.lengths.tolist()), prompts, strict=True):
        length, responses = len(sequence) - 1, len(sequence) - prompt
        total = -(-length // alignment) * alignment
        here = zigzag_positions(total, context_size, context_rank)  # [total / C]
        real = here < length
        inputs.append(torch.where(real, sequence[here.clamp(max=length - 1)], 0))
        positions.append(here)
        padding.append(~real)
        predicts = torch.nonzero(real & (here >= prompt - 1)).squeeze(1)  # local indices of response predictions
        hidden.append(predicts + local_start)
        targets.append(sequence[here[predicts] + 1])
        response_index.append(here[predicts] - (prompt - 1) + response_start)
        chunk = len(here) // chunks
        segments += [int(((predicts >= k * chunk) & (predicts < (k + 1) * chunk)).sum()) for k in range(chunks)]
        padded.append(total)
        local_start += len(here)
        response_start += responses
    if not padded:
        return _padding_micro_batch(chosen, alignment, zigzag_positions(alignment, context_size, context_rank))
    in_response = _response_positions(chosen)
    return MicroBatch(
        input_ids=torch.cat(inputs),
        position_ids=torch.cat(positions),
        is_padding=torch.cat(padding),
        cu_seqlens=torch.tensor([0, *padded]).cumsum(0).to(torch.int32),
        padded_lengths=tuple(padded),
        hidden_index=torch.cat(hidden),
        targets=torch.cat(targets),
        response_index=torch.cat(response_index),
        segment_offsets=torch.tensor([0, *segments]).cumsum(0),
        loss_mask=chosen.loss_mask[in_response],
        response_offsets=torch.cat([torch.zeros(1, dtype=torch.int64), chosen.response_lengths.cumsum(0)]),
        advantages=chosen.advantages,
        sequence_index=torch.tensor(list(index), dtype=torch.int64),
        rollout_log_probs=chosen.rollout_log_probs[in_response],
        routing=_routing_at(chosen, positions) if chosen.routing.shape[1] else None,
    )


def _routing_at(rollouts: Rollouts, positions: Sequence[torch.Tensor]) -> tuple[torch.Tensor]:
    """Return the routing of each sequence's positions, `[L, N / C, K]`; padding gets the first K experts.

    Raises:
        ValueError: an input token has none.
    """
    # Experts of a token must differ, also of one that counts nowhere: Megatron-Core sends each token to K experts.
    padding = torch.arange(rollouts.routing.shape[2], dtype=rollouts.routing.dtype)
    parts = []
    of_sequences = rollouts.routing.split(rollouts.lengths.tolist())
    for number, routing, here in zip(rollouts.ids.tolist(), of_sequences, positions, strict=True):
        experts = routing[:-1]
        if bool((experts == NO_EXPERT).any()):
            raise ValueError(f"response {number} has no routing for some of its tokens, so it cannot be replayed")
        rows = experts[here.clamp(max=len(experts) - 1)]
        parts.append(torch.where((here < len(experts))[:, None, None], rows, padding))
    return (torch.cat(parts).transpose(0, 1),)


def _response_positions(rollouts: Rollouts) -> torch.Tensor:
    """[N] bool: tokens after the prompt, holes included."""
    within = torch.arange(rollouts.tokens.numel()) - torch.repeat_interleave(rollouts.offsets[:-1], rollouts.lengths)
    return within >= torch.repeat_interleave(rollouts.prompt_lengths, rollouts.lengths)


def _padding_micro_batch(empty: Rollouts, alignment: int, positions: torch.Tensor) -> MicroBatch:
    """One sequence of padding and no response: keeps a rank in step with the others of its pipeline schedule."""
    nothing = torch.zeros(0, dtype=torch.int64)
    return MicroBatch(
        input_ids=torch.zeros_like(positions),
        position_ids=positions,
        is_padding=torch.ones_like(positions, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, alignment], dtype=torch.int32),
        padded_lengths=(alignment,),
        hidden_index=nothing,
        targets=nothing,
        response_index=nothing,
        segment_offsets=torch.zeros(1, dtype=torch.int64),
        loss_mask=empty.loss_mask,
        response_offsets=torch.zeros(1, dtype=torch.int64),
        advantages=empty.advantages,
        sequence_index=nothing,
        rollout_log_probs=empty.rollout_log_probs,
    )
