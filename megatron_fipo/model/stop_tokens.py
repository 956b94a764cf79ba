"""Tokenizer of a checkpoint, and its stop tokens from all files that define any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_fipo.atomic_file import read_json

GENERATION_CONFIG = "generation_config.json"
_VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def stop_token_ids(path: str | Path, tokenizer: Any, overrides: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """Return the end-of-sequence tokens of generation config, config and tokenizer together.

    vLLM and transformers each stop at some of them; all count as stop tokens here.

    Args:
        overrides: replacements for fields of config.json.

    Raises:
        ValueError: there are none, so that no response would end; or a file that defines some is invalid.
    """
    stops = declared_stop_tokens(path, tokenizer, overrides)
    if not stops:
        raise ValueError(
            f"{path} has no end-of-sequence token (eos_token_id) in its tokenizer, {GENERATION_CONFIG} or config.json"
        )
    return stops


def declared_stop_tokens(
    path: str | Path, tokenizer: Any, overrides: Mapping[str, Any] | None = None
) -> tuple[int, ...]:
    """Return the same as `stop_token_ids`, or () if there are none; `tokenizer` may be None.

    Raises:
        ValueError: a file is invalid, or contains something other than token ids.
    """
    stops: set[int] = set()
    config, generation = Path(path) / "config.json", Path(path) / GENERATION_CONFIG
    if config.is_file():
        stops |= _ids({**read_json(config), **(overrides or {})}, config)
    if generation.is_file():
        stops |= _ids(read_json(generation), generation)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    return tuple(sorted(stops))


def has_tokenizer(path: Path) -> bool:
    """Return whether a checkpoint's directory has the files of a tokenizer."""
    return any((path / name).is_file() for name in _VOCABULARIES)


def load_tokenizer(path: str | Path) -> Any:
    """Return the tokenizer in a checkpoint's directory.

    Raises:
        ValueError: it is not there, or cannot be read.
    """
    if not has_tokenizer(Path(path)):  # transformers would make an empty one
        raise ValueError(f"no tokenizer: none of {', '.join(_VOCABULARIES)} is in {path}")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(f"the tokenizer of {path} cannot be read: {error}") from None


def without_stop_token(token_ids: Sequence[int], stops: Sequence[int]) -> list[int]:
    """Return a response without its stop token, which is not part of the text."""
    tokens = list(token_ids)
    return tokens[:-1] if tokens and tokens[-1] in stops else tokens


def _ids(settings: Mapping[str, Any], file: Path) -> set[int]:
    named = settings.get("eos_token_id")
    ids = named if isinstance(named, list | tuple) else [] if named is None else [named]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError(f"eos_token_id of {file} must be a token id or a list of them, got {named!r}")
    return set(ids)
