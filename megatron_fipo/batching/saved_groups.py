"""Groups that are kept from one batch to the next, as a checkpoint stores them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch

from megatron_fipo.batch import NO_EXPERT, Rollouts
from megatron_fipo.batching.background import Group, PartialResponse
from megatron_fipo.batching.step_batch import no_rollouts
from megatron_fipo.data import Prompt


def packed(groups: Sequence[Group]) -> dict[str, Any]:
    """Return paused or finished groups as tensors and lists: their responses so far, and their state."""
    rollouts = [group.scored or group.rollouts() for group in groups]
    return {
        "rollouts": vars(Rollouts.concatenate([no_rollouts(), *rollouts])),
        "finished": [response.finished for group in groups for response in group.responses],
        "scored": [group.scored is not None for group in groups],
    }


def unpacked(parts: Sequence[dict[str, Any]], group_size: int, prompts: Iterator[tuple[int, Prompt]]) -> list[Group]:
    """Return the groups that `packed` stored in parts, as far as they are among `prompts`, numbered and in order."""
    found: dict[int, tuple[list[PartialResponse], Rollouts | None]] = {}
    for part in parts:
        rollouts = Rollouts.from_state_dict(part["rollouts"])
        responses = _partial_responses(rollouts, part["finished"])
        for place, scored in enumerate(part["scored"]):
            rows = torch.arange(place * group_size, (place + 1) * group_size)
            number = int(rollouts.ids[rows[0]]) // group_size
            found[number] = responses[rows[0] : rows[-1] + 1], rollouts.select(rows) if scored else None
    last = max(found, default=-1)
    groups = []
    for number, prompt in takewhile(lambda item: item[0] <= last, prompts):
        if number in found:
            its_partial_responses, its_scores = found[number]
            groups.append(Group(number, prompt, its_partial_responses, scored=its_scores))
    return groups


def _partial_responses(rollouts: Rollouts, finished: Sequence[bool]) -> list[PartialResponse]:
    values = (rollouts.tokens, rollouts.rollout_log_probs, rollouts.weight_versions)
    columns = [[x.tolist() for x in v.split(rollouts.lengths.tolist())] for v in values]
    prompts, truncated = rollouts.prompt_lengths.tolist(), rollouts.truncated.tolist()
    routing = map(_known, rollouts.routing.split(rollouts.lengths.tolist()))
    rows = zip(prompts, *columns, finished, truncated, routing, strict=True)
    return [PartialResponse(t[p:], log_p[p:], v[p:], done, cut, known) for p, t, log_p, v, done, cut, known in rows]


def _known(routing: torch.Tensor) -> torch.Tensor | None:
    """Return the routing of a response's inputs; None if it has none yet."""
    inputs = routing[:-1]
    return inputs.clone() if inputs.numel() and bool((inputs != NO_EXPERT).all()) else None
