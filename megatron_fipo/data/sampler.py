"""Order of prompts: each once per epoch, shuffled by (seed, epoch), resumable at any point."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_fipo.data.prompts import Prompt, PromptSet


class PromptStream:
    """Endless stream over a `PromptSet`.

    The order is global and independent of ranks, so that a run continues with the same order on another layout. Each
    replica takes its share of what `next` returns.
    """

    def __init__(self, prompts: PromptSet, seed: int, shuffle: bool = True) -> None:
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._fingerprint = prompts.fingerprint
        self._epoch, self._position = 0, 0
        self._order = self._shuffled(epoch=0)

    @property
    def epoch(self) -> int:
        """Number of complete epochs."""
        return self._epoch

    def next(self, n: int) -> list[Prompt]:
        """Return the next `n` prompts, possibly from two epochs."""
        taken: list[Prompt] = []
        while len(taken) < n:
            rows = self._order[self._position : self._position + n - len(taken)]
            taken += [self._prompts[row] for row in rows]
            self._go_to(self._epoch, self._position + len(rows))
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return position and identity of the stream as plain numbers and strings."""
        return {"epoch": self._epoch, "position": self._position, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`.

        Raises:
            ValueError: it belongs to other prompts, or another seed or shuffling.
        """
        for name, current in self._identity().items():
            if state[name] != current:
                raise ValueError(
                    f"cannot continue the data stream: its {name} was {state[name]!r} but is now {current!r}; "
                    "start a new run, or restore the previous data and seed"
                )
        self._go_to(state["epoch"], state["position"])

    def _identity(self) -> dict[str, Any]:
        return {"seed": self._seed, "shuffle": self._shuffle, "dataset_fingerprint": self._fingerprint}

    def _go_to(self, epoch: int, position: int) -> None:
        if position == len(self._prompts):
            epoch, position = epoch + 1, 0
        if epoch != self._epoch:
            self._order = self._shuffled(epoch)
        self._epoch, self._position = epoch, position

    def _shuffled(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._prompts)))
        # Philox is counter-based: the stream of (seed, epoch) is defined by these two numbers on every machine.
        generator = np.random.Generator(np.random.Philox(key=[self._seed, epoch]))
        return generator.permutation(len(self._prompts)).tolist()
