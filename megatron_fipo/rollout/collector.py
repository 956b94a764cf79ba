"""The parts of a collector of training batches that do not depend on how responses are scheduled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from megatron_fipo.algorithm import GroupCollector
from megatron_fipo.batch import Rollouts
from megatron_fipo.config import Config
from megatron_fipo.data import Prompt, PromptStream
from megatron_fipo.parallel.topology import Topology
from megatron_fipo.rollout.protocol import RolloutEngine, Sampling

Score = Callable[[Sequence[Prompt], Rollouts], Rollouts]  # responses, one a prompt, with their rewards


class Collector:
    """Source of one training batch after another, from a stream of prompts.

    Attributes:
        next_group: number of the first group behind the last batch.
        batches: handed out so far; one a step, so the next one trains the weights of this many steps.
    """

    def __init__(
        self,
        config: Config,
        topology: Topology,
        engine: RolloutEngine,
        score: Score,
        stream: PromptStream,
        stop_token_ids: tuple[int, ...],
    ) -> None:
        rollout = config.rollout
        self.config = config
        self.topology = topology
        self.engine = engine
        self.score = score
        self.stream = stream
        self.sampling = Sampling(
            rollout.temperature, rollout.top_p, rollout.top_k, rollout.max_response_tokens, stop_token_ids
        )
        self.collector: GroupCollector[int] = GroupCollector(
            rollout.prompts_per_step,
            rollout.max_rounds,
            rollout.when_exhausted,
            rollout.surplus_groups,
            filter_groups=rollout.dynamic_sampling,
        )
        self.next_group = 0
        self.batches = 0

    @property
    def round_size(self) -> int:
        """Number of prompts of a generation round."""
        return self.config.rollout.prompts_per_round or self.config.rollout.prompts_per_step

    def position(self) -> dict[str, Any]:
        """Return the position of the stream of prompts."""
        return {"stream": self.stream.state_dict(), "next_group": self.next_group, "batches": self.batches}

    def go_to(self, position: dict[str, Any]) -> None:
        """Move the stream of prompts to a position.

        Raises:
            ValueError: the prompts, their seed or their shuffling differ from those of `position`.
        """
        self.batches = position["batches"]  # also where the prompts are refused, and start anew
        self.stream.load_state_dict(position["stream"])
        self.next_group = position["next_group"]
