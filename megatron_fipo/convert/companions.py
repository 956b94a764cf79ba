"""Companion files of a checkpoint: config, generation config, tokenizer, chat template, in portable form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from megatron_fipo.atomic_file import read_json
from megatron_fipo.model.rope import in_both_spellings
from megatron_fipo.model.stop_tokens import GENERATION_CONFIG, declared_stop_tokens, has_tokenizer, load_tokenizer

_CONFIG = "config.json"
_COPIED = (
    *("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.*", "*.model", "*.tiktoken"),
)
_EXPERTS = ("num_experts", "num_local_experts")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_companions(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copy a checkpoint's files other than weights: config, generation config, tokenizer, chat template.

    `dtype` replaces the dtype in the config.

    Raises:
        ValueError: config or generation config is invalid.
    """
    _copy(source, target)
    _write(target / _CONFIG, readable_config(read_json(source / _CONFIG), dtype))
    if (source / GENERATION_CONFIG).is_file():
        _write(target / GENERATION_CONFIG, read_json(source / GENERATION_CONFIG))


def export_companions(
    source: Path, target: Path, stops: tuple[int, ...], config: Mapping[str, Any], dtype: torch.dtype | None
) -> None:
    """Write the companion files of an exported checkpoint.

    Args:
        stops: tokens that end a response, for the generation config.
        config: config of the exported model.
        dtype: of the weights; None: as in the config.
    """
    _copy(source, target)
    _write(target / _CONFIG, readable_config(config, dtype))
    file = source / GENERATION_CONFIG
    generation = read_json(file) if file.is_file() else {n: config[n] for n in _TOKEN_IDS if config.get(n) is not None}
    if stops:
        generation["eos_token_id"] = stops[0] if len(stops) == 1 else list(stops)
    if generation:
        _write(target / GENERATION_CONFIG, generation)


def stop_tokens_of(directory: Path, overrides: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """Return the tokens that end a response, from the files in the directory.

    Raises:
        ValueError: a file is invalid.
    """
    tokenizer = load_tokenizer(directory) if has_tokenizer(directory) else None
    return declared_stop_tokens(directory, tokenizer, overrides)


def readable_config(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Return a config.json that transformers 4, transformers 5 and vLLM read identically.

    Fields with two spellings are written in both: rotary embeddings, dtype, number of experts.

    Raises:
        ValueError: two spellings contradict each other.
    """
    written = in_both_spellings(config)
    named = dtype if dtype is not None else _agreed(config, "dtype", "torch_dtype")
    if named is not None:
        written["dtype"] = written["torch_dtype"] = str(named).removeprefix("torch.")
    if (experts := _agreed(config, *_EXPERTS)) is not None:
        written |= dict.fromkeys(_EXPERTS, experts)
    return written


def _agreed(config: Mapping[str, Any], *names: str) -> Any:
    """Return the value of fields with these names; None if none is present."""
    values = {name: config[name] for name in names if config.get(name) is not None}
    if len(set(values.values())) > 1:
        raise ValueError(f"config.json has {' and '.join(f'{n} {v}' for n, v in values.items())}: keep one")
    return next(iter(values.values()), None)


def exported_config(config: PretrainedConfig, source: Path) -> dict[str, Any]:
    """Return the config.json of a loaded config with its overrides.

    Token ids that are class defaults are exported only if the source has them.
    """
    written = config.to_diff_dict()
    given, defaults = read_json(source / _CONFIG), type(config)()
    for name in _TOKEN_IDS:
        if name not in given and written.get(name) == getattr(defaults, name, None):
            written.pop(name, None)
    return written


def _copy(source: Path, target: Path) -> None:
    for file in sorted({f for pattern in _COPIED for f in source.glob(pattern) if f.is_file()}):
        if file.is_symlink():
            _check_link(file)
        shutil.copyfile(file, target / file.name)


def _check_link(file: Path) -> None:
    """Check that a link stays inside the checkpoint, since a crafted one could expose other files.

    In Hugging Face's cache, `snapshots/REVISION/NAME` links to `blobs/HASH` of the same model.

    Raises:
        ValueError: it points outside of the checkpoint.
    """
    directory, found = file.parent.resolve(), file.resolve()
    cache = directory.parent.parent / "blobs" if directory.parent.name == "snapshots" else None
    if found.parent not in (directory, cache):
        raise ValueError(f"{file} links to {found}, outside of the checkpoint: replace the link with the file")


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
