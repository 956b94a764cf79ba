"""Rotary embeddings in config.json: both spellings, and what Megatron-Core computes.

transformers 5 has `rope_parameters`; transformers 4, and most published checkpoints, have `rope_theta` and
`rope_scaling`. A reader of only one spelling uses defaults for missing fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Megatron-Core uses these constants for Llama 3's rope; only the factor is configurable.
_LLAMA3 = {"original_max_position_embeddings": 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_NEEDS: dict[str, set[str]] = {"default": set(), "linear": {"factor"}, "llama3": {"factor", *_LLAMA3}}
_FILLED_IN = {"original_max_position_embeddings"}  # by transformers, from max_position_embeddings
_FIELDS = ("rope_parameters", "rope_scaling")


def checked_rope(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a config's rope parameters, always with their type.

    Raises:
        ValueError: the type is not supported, a number is missing or invalid, or Megatron-Core would use another one.
    """
    rope = {"rope_type": "default", **(parameters or {})}
    kind = rope["rope_type"]
    if kind not in _NEEDS:
        raise ValueError(f"rope type {kind!r} is not supported: must be one of {', '.join(_NEEDS)}")
    if missing := sorted(({"rope_theta"} | _NEEDS[kind]) - rope.keys()):
        raise ValueError(f"rope_parameters {rope} lacks {' and '.join(missing)}; an override must be complete")
    for name in sorted({"rope_theta"} | _NEEDS[kind]):
        _check_number(name, rope[name])
    for name, value in _LLAMA3.items():
        if kind == "llama3" and rope[name] != value:
            raise ValueError(
                f"llama3 rope with {name} {rope[name]} is not supported: must be {value}, as in Megatron-Core"
            )
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported")
    return rope


def check_spellings(config: Mapping[str, Any], where: str) -> None:
    """Check that both spellings in a config.json are complete and consistent.

    Raises:
        ValueError: a field is missing or not a number, or the two contradict each other; names the field and `where`.
    """
    for field in _FIELDS:
        _check_field(field, config.get(field), where)
    if config.get("rope_theta") is not None:
        _check_number("rope_theta", config["rope_theta"], f" of {where}")
    new, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    if new is None:
        return
    old = {**(scaling or {}), "rope_theta": config.get("rope_theta")}
    if old["rope_theta"] is not None and new.get("rope_theta", old["rope_theta"]) != old["rope_theta"]:
        raise ValueError(
            f"{where} has rope_theta {old['rope_theta']} and rope_parameters with rope_theta {new['rope_theta']}: "
            "readers disagree on which to use; make them equal"
        )
    if scaling is not None and _scaling(new) != _scaling(old):
        raise ValueError(
            f"{where} has rope_scaling {_scaling(old)} and rope_parameters {_scaling(new)}: readers disagree on "
            "which to use; make them equal"
        )


def overridden_rope(current: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return rope parameters with a model's overrides of rope_parameters, rope_scaling and rope_theta applied.

    `rope_parameters` replaces everything, `rope_scaling` everything but the base, and `rope_theta` only the base.

    Raises:
        ValueError: an override has the wrong type, or overrides contradict each other.
    """
    for field in _FIELDS:
        if overrides.get(field) is not None and not isinstance(overrides[field], Mapping):
            raise ValueError(f"model.overrides.{field}: {overrides[field]!r} must be a mapping, as in config.json")
    if len(overrides.keys() & set(_FIELDS)) > 1:
        raise ValueError(
            "model.overrides.rope_parameters and rope_scaling are two spellings of the same setting: give only one"
        )
    if "rope_parameters" in overrides:
        rope = dict(overrides["rope_parameters"] or {})
        if rope and _scaling(current) and "rope_type" not in _normalized(rope):
            raise ValueError(
                f"model.overrides.rope_parameters replaces {dict(current)}: give its rope_type ('default' for none); "
                "model.overrides.rope_theta changes only the base"
            )
    elif "rope_scaling" in overrides:
        rope = {"rope_theta": current.get("rope_theta"), "rope_type": "default"}
        rope |= _normalized(overrides["rope_scaling"] or {})
    else:
        rope = dict(current)
    if "rope_theta" in overrides:
        theta = overrides["rope_theta"]
        if "rope_parameters" in overrides and rope.get("rope_theta", theta) != theta:
            raise ValueError(f"model.overrides: rope_theta {theta} and rope_parameters' {rope['rope_theta']} differ")
        _check_number("model.overrides.rope_theta", theta)
        rope["rope_theta"] = theta
    return _normalized(rope)


def in_both_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json with rotary embeddings in both spellings.

    `rope_scaling` is null if positions are not scaled.
    """
    given = config.get("rope_parameters")
    rope = dict(given) if given is not None else {**(config.get("rope_scaling") or {})}
    rope = {"rope_type": "default", **_normalized(rope)}
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = config.get("rope_theta")
    if rope["rope_theta"] is None:  # absent in both spellings, whose readers have the same default
        return dict(config)
    scaling = _scaling(rope) or None
    if scaling and scaling["rope_type"] == "linear":
        scaling["type"] = "linear"  # required by readers before transformers 4.43
    return {**config, "rope_parameters": rope, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def _normalized(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with `rope_type` instead of the old name `type`."""
    kind = {"rope_type": rope["type"]} if "type" in rope else {}
    return {**kind, **{name: value for name, value in rope.items() if name != "type"}}


def _scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return its `rope_scaling`; empty if positions are not scaled."""
    rope = _normalized(rope)
    if rope.get("rope_type", "default") == "default":
        return {}
    return {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}


def _check_field(field: str, rope: Any, where: str) -> None:
    if rope is None:
        return
    if not isinstance(rope, Mapping):
        raise ValueError(f"{field} of {where} is {rope!r}; expected an object with rope_type and its numbers")
    kinds = {rope[name] for name in ("rope_type", "type") if name in rope}
    if len(kinds) > 1:
        raise ValueError(f"{field} {dict(rope)} of {where} has both type and rope_type; keep rope_type")
    unread = rope.keys() - {"rope_theta", "partial_rotary_factor"}
    if unread and not kinds:
        raise ValueError(f"{field} {dict(rope)} of {where} lacks rope_type, without which readers ignore the rest")
    needs = _NEEDS.get(next(iter(kinds), "default"), set())
    if missing := sorted(needs - _FILLED_IN - rope.keys()):
        raise ValueError(f"{field} {dict(rope)} of {where} lacks {' and '.join(missing)}")
    for name in sorted(needs & rope.keys()):
        _check_number(name, rope[name], f" in {field} of {where}")


def _check_number(name: str, value: Any, where: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name}{where} is {value!r}; expected a positive number")
