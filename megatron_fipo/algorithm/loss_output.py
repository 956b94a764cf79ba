"""Result of a loss. N: packed tokens, S: sequences."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from megatron_fipo.algorithm.metrics import Mean


@dataclass(frozen=True)
class LossOutput:
    """Result of a loss, with sums instead of means.

    Divide `loss_sum` once, by the `denominator` summed over micro-batches and ranks. `future_kl` and
    `influence_weights` are only needed for plots, so the compiled loss computes them when one is first accessed.
    """

    loss_sum: Tensor  # scalar, differentiable: over surviving tokens (token-mean) or over sequences' terms (seq-*)
    num_tokens: Tensor  # scalar int64: surviving tokens
    num_sequences: Tensor  # scalar int64: surviving sequences that have a loss token
    denominator: Tensor  # the one that the aggregation divides by
    vetoed: Tensor  # [S] bool: removed sequences
    sequence_tokens: Tensor | None  # [S] int64: loss tokens of each segment's whole sequence, if sharded
    metrics: Mapping[str, Mean | Tensor]  # mergeable, see `metrics`
    influence: Callable[[], tuple[Tensor, Tensor]]  # values of the two properties below

    @property
    def future_kl(self) -> Tensor:
        """[N] S_t, detached, nats."""
        return self._influence[0]

    @property
    def influence_weights(self) -> Tensor:
        """[N] f_t, detached, after clip and safety rule."""
        return self._influence[1]

    @cached_property
    def _influence(self) -> tuple[Tensor, Tensor]:
        return self.influence()
