"""Where a response ends."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig


def stop_token_ids(path: str, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: the generation config's and the tokenizer's end-of-sequence tokens.

    Raises:
        ValueError: there is none, so that no response would ever end.
    """
    stops: set[int] = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    try:
        eos = GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id
    except OSError:  # the checkpoint has no generation config
        eos = None
    if eos is not None:
        stops.update(eos if isinstance(eos, list) else [eos])
    if not stops:
        raise ValueError(f"{path} names no end-of-sequence token, neither in its tokenizer nor its generation config")
    return tuple(sorted(stops))
