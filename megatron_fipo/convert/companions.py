"""The small files beside a checkpoint's weights, written so that readers of several generations find the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from megatron_fipo.model.architecture import read_json
from megatron_fipo.model.rope import in_both_spellings
from megatron_fipo.model.stop_tokens import GENERATION_CONFIG, declared_stop_tokens, load_tokenizer

_CONFIG = "config.json"
_COPIED = (
    *("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.*", "*.model", "*.tiktoken"),
)
_EXPERTS = ("num_experts", "num_local_experts")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_companions(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Copy what belongs to a checkpoint beside its weights: config, generation config, tokenizer, chat template.

    `dtype` replaces the type that the config names.

    Raises:
        ValueError: config or generation config is broken.
    """
    _copy(source, target)
    _write(target / _CONFIG, readable_config(read_json(source / _CONFIG), dtype))
    if (source / GENERATION_CONFIG).is_file():
        _write(target / GENERATION_CONFIG, read_json(source / GENERATION_CONFIG))


def export_companions(
    source: Path, target: Path, stops: tuple[int, ...], config: Mapping[str, Any], dtype: torch.dtype | None
) -> None:
    """Write them for those who generate with an exported checkpoint.

    Args:
        stops: tokens that end a response; the generation config names all of them.
        config: of the exported model.
        dtype: of the weights; None: as the config says.
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
    """Return the tokens that end a response, by the files in the directory.

    Raises:
        ValueError: one of them is broken.
    """
    return declared_stop_tokens(directory, load_tokenizer(directory), overrides)


def readable_config(config: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Return a config.json that transformers 4 and 5 and vLLM read alike.

    What they spell in two ways is there in both: rotary embeddings, the weights' type, the number of experts.

    Raises:
        ValueError: the two contradict each other.
    """
    written = in_both_spellings(config)
    named = dtype if dtype is not None else _agreed(config, "dtype", "torch_dtype")
    if named is not None:
        written["dtype"] = written["torch_dtype"] = str(named).removeprefix("torch.")
    if (experts := _agreed(config, *_EXPERTS)) is not None:
        written |= dict.fromkeys(_EXPERTS, experts)
    return written


def _agreed(config: Mapping[str, Any], *names: str) -> Any:
    """Return the value that fields of these names have; None: none of them is there."""
    values = {name: config[name] for name in names if config.get(name) is not None}
    if len(set(values.values())) > 1:
        raise ValueError(f"config.json has {' and '.join(f'{n} {v}' for n, v in values.items())}: keep one")
    return next(iter(values.values()), None)


def exported_config(config: PretrainedConfig, source: Path) -> dict[str, Any]:
    """Return what a loaded config, with its overrides, writes into config.json.

    A class has defaults for its tokens. Where the source names none, its export does not either.
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
    """Check that a checkpoint's link leads to a file of that checkpoint: who made it may have wished for another one.

    Hugging Face's cache has `snapshots/REVISION/NAME` lead to `blobs/HASH` of the same model.

    Raises:
        ValueError: it leads elsewhere.
    """
    directory, found = file.parent.resolve(), file.resolve()
    cache = directory.parent.parent / "blobs" if directory.parent.name == "snapshots" else None
    if found.parent not in (directory, cache):
        raise ValueError(f"{file} is a link to {found}, outside of the checkpoint: replace it by the file itself")


def _write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
