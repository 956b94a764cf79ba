"""Loading of configs from YAML and `key=value` overrides, and saving."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from megatron_fipo.config.problems import validate
from megatron_fipo.config.sections import Config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides and validate the result.

    Raises:
        ValueError: unreadable file, unknown key (the message suggests the nearest known one), wrong type or illegal
            value.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"config file {path} does not exist")
    for text in overrides:
        if "=" not in text:
            raise ValueError(f"override {text!r} is not of the form section.key=value")
    try:
        given = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        _name_switches(given)
        config = _typed(given)
    except ConfigKeyError as error:
        raise ValueError(_unknown_key(str(error.full_key))) from None
    except OmegaConfBaseException as error:
        key = error.full_key or _refused_key(given)
        reason = str(error.msg or error).splitlines()[0].replace("'$VALUE' of type '$VALUE_TYPE' ", "")
        raise ValueError(f"{key}: {reason}") from None
    except Exception as error:  # YAML's errors share no public base class with OmegaConf's
        raise ValueError(f"cannot read {path}: {error}") from None
    assert isinstance(config, Config)
    _refuse_nested(config)
    validate(config)
    return config


def _refuse_nested(config: Config) -> None:
    """Reject a mapping or list inside a list, which OmegaConf accepts as an element of a typed tuple."""
    for section in fields(config):
        for name, value in vars(getattr(config, section.name)).items():
            for element in value if isinstance(value, tuple) else ():
                if not isinstance(element, str | int | float):
                    raise ValueError(f"{section.name}.{name}: {element!r} is no element of a list of plain values")


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


def _typed(given: Any) -> Any:
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), given))


def _refused_key(given: Any) -> str:
    """Return the key of a value that OmegaConf rejects without naming it, as inside tuples."""
    sections: Any = OmegaConf.to_container(given)
    for section, values in sections.items():
        if not isinstance(values, dict):
            return str(section)
        for name, value in values.items():
            try:
                _typed({section: {name: value}})
            except OmegaConfBaseException:
                return f"{section}.{name}"
    return "config"


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML for `load_config`."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _unknown_key(key: str) -> str:
    known, sections = _known_keys(Config()), [f.name for f in fields(Config)]
    names = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    name = key.rsplit(".", 1)[-1]
    if name in names:  # correct name in the wrong section
        nearest = [names[name]]
    else:
        nearest = difflib.get_close_matches(key, known if "." in key else sections, n=1, cutoff=0.5) or [
            names[n] for n in difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        ]
    hint = f"; did you mean {nearest[0]!r}?" if nearest else f"; known sections: {', '.join(sections)}"
    return f"unknown config key {key!r}{hint}"


def _known_keys(node: Any, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for f in fields(node):
        value = getattr(node, f.name)
        keys += _known_keys(value, f"{prefix}{f.name}.") if is_dataclass(value) else [prefix + f.name]
    return keys
