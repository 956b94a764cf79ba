"""Options of `megatron-fipo mismatch`; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.config import Config

DEFAULT_TOKENS = 256


@dataclass(frozen=True)
class Options:
    """Options of a comparison.

    Attributes:
        responses: number of responses, each to another prompt.
        tokens: longest response; None: `DEFAULT_TOKENS`, or fewer if the run's are shorter.
        out: file for the report as JSON; None: none is written.
    """

    responses: int
    tokens: int | None
    out: Path | None

    def response_tokens(self, config: Config) -> int:
        """Return the length at which responses end."""
        return min(DEFAULT_TOKENS, config.rollout.max_response_tokens) if self.tokens is None else self.tokens

    def check(self, config: Config) -> None:
        """Check the options.

        Raises:
            ValueError: responses would be longer than in the run, or `out` cannot be written.
        """
        longest = config.rollout.max_response_tokens
        if self.tokens is not None and self.tokens > longest:
            raise ValueError(f"--tokens {self.tokens} must be at most rollout.max_response_tokens, which is {longest}")
        if self.out is not None and self.out.is_dir():
            raise ValueError(f"--out {self.out} is a directory, but must be a file")
        if self.out is not None and not self.out.absolute().parent.is_dir():
            raise ValueError(f"--out {self.out} is in a directory that does not exist; create it first")
