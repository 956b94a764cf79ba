"""The embedded engine beside the trainer, on the device that there is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_fipo.batch import Rollouts
from megatron_fipo.rollout import Request, Sampling
from tests.support.actors import actor_of, batch_of, in_order


class Found(NamedTuple):
    """`largest_difference`: of a token's log-probability between engine and trainer; `tokens`: compared."""

    largest_difference: float
    repeats: bool
    tokens: int


def generated_and_trained(path: Path, **sections: dict[str, Any]) -> Found:
    """Generate responses to eight prompts of unequal lengths, twice, and compare with the trainer."""
    prompts = [list(range(3, 4 + n)) for n in range(8)]
    requests = [Request(tuple(prompt), seed=100 + i) for i, prompt in enumerate(prompts)]
    sampling = Sampling(1.0, 1.0, 0, 40, (17, 42))
    with actor_of(path, engine=True, **sections) as actor:
        with actor.inference():
            responses = actor.infer(requests, sampling)
            again = actor.infer(requests, sampling)
        rollouts = Rollouts.from_responses(
            ids=range(len(prompts)),
            prompts=prompts,
            responses=[r.token_ids for r in responses],
            log_probs=[r.log_probs for r in responses],
            truncated=[r.truncated for r in responses],
        )
        batch = batch_of(actor, rollouts)
        own = in_order(batch, actor.log_probs(batch))
    drawn = torch.cat([torch.tensor(r.log_probs) for r in responses])
    difference = (torch.cat([own[i] for i in range(len(prompts))]) - drawn).abs().max()
    same = [r.token_ids for r in responses] == [r.token_ids for r in again]
    return Found(float(difference), same, drawn.numel())
