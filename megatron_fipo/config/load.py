"""Loading of configs from YAML and `key=value` overrides, and saving."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from megatron_fipo.config.describe import type_text
from megatron_fipo.config.problems import validate
from megatron_fipo.config.renamed import check_names, with_current_names
from megatron_fipo.config.sections import Config
from megatron_fipo.config.setting import settings, subsections, value_of


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides and validate the result.

    The saved config.yaml of an old run may have former names of settings; another file, or an override, must not.

    Raises:
        ValueError: unreadable file, unknown key (the message suggests the nearest known one), former name, wrong type
            or illegal value.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config file {path} does not exist")
    given = _merged(path, _parsed(overrides))
    try:
        _name_switches(given)
        config = _typed(given)
    except ConfigKeyError as error:
        raise ValueError(_unknown_key(str(error.full_key))) from None
    except OmegaConfBaseException as error:
        raise ValueError(_refusal(given, error)) from None
    except Exception as error:  # of interpolations
        raise ValueError(f"cannot read {path}: {error}") from None
    assert isinstance(config, Config)
    _refuse_nested(config)
    validate(config)
    return config


def _parsed(overrides: Sequence[str]) -> Any:
    """Return the unresolved settings of overrides."""
    changes: Any = OmegaConf.create({})
    for text in overrides:
        if "=" not in text:
            raise ValueError(f"override {text!r} must have the form section.key=value")
        try:
            changes.merge_with_dotlist([text])
        except Exception as error:  # YAML's errors share no public base class with OmegaConf's
            raise ValueError(f"cannot read the override {text!r}: {str(error).splitlines()[0]}") from None
    check_names(_plain(changes))
    return changes


def _merged(path: Path, changes: Any) -> Any:
    """Return the unresolved settings of a file and overrides; those of an old run under their current names."""
    try:
        content: Any = OmegaConf.load(path)
        if not isinstance(content, DictConfig):
            raise ValueError("it must be a mapping with sections")
    except Exception as error:  # as above
        raise ValueError(f"cannot read {path}: {error}") from None
    if _is_saved(path):
        content = OmegaConf.create(with_current_names(_plain(content)))
    else:
        check_names(_plain(content))
    try:
        return OmegaConf.merge(content, changes)
    except Exception as error:  # a TypeError where a list is to replace a section
        raise ValueError(f"cannot apply the overrides to {path}: {str(error).splitlines()[0]}") from None


def _is_saved(path: Path) -> bool:
    """Return whether a file is the saved configuration of a run, beside its metrics."""
    named = path.name == "config.yaml" or path.match("config_until_step_*.yaml")
    return named and path.with_name("metrics.jsonl").is_file()


def _plain(content: Any) -> Any:
    return OmegaConf.to_container(content, resolve=False)


def _refuse_nested(config: Config) -> None:
    """Reject a mapping or list inside a list, which OmegaConf accepts as an element of a typed tuple."""
    for setting in settings(type(config)):
        value = value_of(config, setting.name)
        for element in value if isinstance(value, tuple) else ():
            if not isinstance(element, str | int | float):
                raise ValueError(f"{setting.name}: {element!r} must be a plain value, not a list or a mapping")


def _name_switches(given: Any) -> None:
    """Undo YAML 1.1's conversion of bare `on` and `off` to booleans, also on the command line."""
    value = OmegaConf.select(given, "model.transformer_engine")
    if isinstance(value, bool):
        OmegaConf.update(given, "model.transformer_engine", "on" if value else "off")


def with_seed(config: Config, seed: int | None) -> Config:
    """Return the config of one of several repeats, with its own directory; None: the unchanged config."""
    if seed is None:
        return config
    ending, directory = f"-seed{seed}", config.run.directory and config.run.directory.rstrip("/")
    name = config.run.name.removesuffix(ending) + ending
    directory = directory and directory.removesuffix(ending) + ending
    return replace(config, run=replace(config.run, seed=seed, name=name, directory=directory))


def checkpoint_setting(text: str) -> str:
    """Return the setting that `checkpoint=DIR` stands for; any other text as it is.

    Raises:
        ValueError: DIR is not a directory.
    """
    name, _, path = text.partition("=")
    if name != "checkpoint":
        return text
    if not Path(path).is_dir():
        raise ValueError(f"checkpoint={path} is not a directory")
    return f"model.hf_path={path}" if any(Path(path).glob("*.safetensors")) else f"model.megatron_path={path}"


def _typed(given: Any) -> Any:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), given))


def _refusal(given: Any, error: OmegaConfBaseException) -> str:
    """Return a message about a value of the wrong type, or an interpolation that cannot be resolved."""
    key = error.full_key or _refused_key(given)
    value: Any = _plain(given)
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    expected = next((type_text(s) for s in settings(Config) if s.name == key), None)
    if key in subsections(Config):
        expected = "a mapping of settings"
    if expected is not None and "${" not in repr(value):
        return f"{key}: expected {expected}, got {'null' if value is None else repr(value)}"
    return f"{key}: {str(error.msg or error).splitlines()[0]}"


def _refused_key(given: Any) -> str:
    """Return the key of a value that OmegaConf rejects without naming it, as inside tuples."""
    for key, value in _leaves(OmegaConf.to_container(given), ""):
        try:
            _typed(_nested(key, value))
        except OmegaConfBaseException:
            return key
    return "config"


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Yield the values of known settings, and what stands in the place of a section, by dotted names."""
    sections = subsections(Config)
    for name, value in node.items():
        key = f"{prefix}{name}"
        if key in sections and isinstance(value, dict):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML for `load_config`."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _unknown_key(key: str) -> str:
    known = [s.name for s in settings(Config)]
    sections = list(subsections(Config))
    last = {k.rpartition(".")[2]: k for k in reversed([*sections, *known])}
    name = key.rpartition(".")[2]
    if name in last:  # correct name in the wrong section
        nearest = [last[name]]
    else:
        candidates = known if "." in key else sections
        nearest = difflib.get_close_matches(key, candidates, n=1, cutoff=0.5) or [
            last[n] for n in difflib.get_close_matches(name, last, n=1, cutoff=0.5)
        ]
    top = [section for section in sections if "." not in section]
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known sections: {', '.join(top)}"
    return f"unknown config key {key!r}{hint}"
