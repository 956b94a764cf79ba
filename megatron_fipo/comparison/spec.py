"""Specification of a comparison: a YAML file with arms, seeds, pairs of arms and endpoints. See docs/comparing.md."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from megatron_fipo.metric_glossary import METRICS, entry_of

MOST_SEEDS = 1000


@dataclass(frozen=True)
class Endpoint:
    """One number of a finished run, fixed before any run: the mean of a metric's last values.

    Attributes:
        last: number of values: evaluations of an `eval/` metric, else training steps.
        log: take the logarithm of the mean, so that differences are ratios.
        smallest: smallest difference of interest, for the power; a ratio's share where `log` is set (0.05: 5%).
    """

    name: str
    metric: str
    last: int
    smallest: float
    log: bool = False

    @property
    def is_of_evaluations(self) -> bool:
        return self.metric.startswith("eval/")


SCORE = Endpoint("score", "eval/avg@k", last=5, smallest=0.01)
LENGTH = Endpoint("length", "batch/response_length/mean", last=20, smallest=0.05, log=True)


@dataclass(frozen=True)
class Spec:
    """A comparison.

    Attributes:
        config: file of the settings that all arms share.
        settings: `section.key` -> value for all arms.
        arms: name -> `section.key` -> value of this arm.
        pairs: (a, b) of each comparison; its effect is a - b.
        prepare: command that makes what a seed's runs need and is missing; "" for none.
        error_rate: family-wise error rate of an endpoint's comparisons.

    In text values and in `prepare`, `{seed}` stands for the seed.
    """

    config: Path
    settings: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]
    pairs: tuple[tuple[str, str], ...]
    seeds: tuple[int, ...]
    endpoints: tuple[Endpoint, ...]
    out: Path
    prepare: str = ""
    error_rate: float = 0.05

    def overrides(self, arm: str, seed: int) -> list[str]:
        """Return the settings of one run as `section.key=value`."""
        values = {**self.settings, **self.arms[arm]}
        return [f"{key}={json.dumps(_for_seed(value, seed))}" for key, value in values.items()]

    def fixed(self) -> dict[str, Any]:
        """Return what must not change once runs have been started, as JSON; the seeds are apart."""
        content = {
            "settings": dict(self.settings),
            "arms": {name: dict(values) for name, values in self.arms.items()},
            "pairs": [list(pair) for pair in self.pairs],
            "endpoints": [asdict(endpoint) for endpoint in self.endpoints],
            "error_rate": self.error_rate,
        }
        return json.loads(json.dumps(content))


def _for_seed(value: Any, seed: int) -> Any:
    if isinstance(value, dict):
        return {key: _for_seed(inner, seed) for key, inner in value.items()}
    if isinstance(value, list):
        return [_for_seed(inner, seed) for inner in value]
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else value


def read_spec(path: Path) -> Spec:
    """Read and check a specification.

    Raises:
        ValueError: the file cannot be read, or everything that is wrong in it, and what is allowed.
    """
    if not path.is_file():
        raise ValueError(f"specification {path} does not exist")
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise ValueError("it must be a mapping")
        content: Any = OmegaConf.to_container(loaded, resolve=False)
    except Exception as error:  # YAML's errors share no public base class with OmegaConf's
        raise ValueError(f"cannot read {path}: {error}") from None
    reader = _Reader(content)
    spec = reader.spec(path)
    if reader.problems:
        raise ValueError(f"{path} is not a legal comparison:\n" + "\n".join(f"  - {p}" for p in reader.problems))
    assert spec is not None
    return spec


class _Reader:
    """Reader of a specification's parts; it notes what is wrong and goes on, so that all of it is reported."""

    def __init__(self, content: Mapping[Any, Any]) -> None:
        self.content = content
        self.problems: list[str] = []

    def spec(self, path: Path) -> Spec | None:
        """Return the specification; None if something is wrong."""
        known = [field.name for field in fields(Spec)]
        self._only(self.content, known, "")
        config = self._text("config")
        if config and not Path(config).is_file():
            self.problems.append(f"config: {config} does not exist (paths begin at the working directory)")
        arms = self._arms()
        made = Spec(
            config=Path(config),
            settings=self._settings(self.content.get("settings") or {}, "settings"),
            arms=arms,
            pairs=self._pairs(arms),
            seeds=self._seeds(),
            endpoints=self._endpoints(),
            out=Path(self._text("out", f"runs/{path.stem}")),
            prepare=self._text("prepare", ""),
            error_rate=self._number(self.content.get("error_rate", Spec.error_rate), "error_rate", below=0.5),
        )
        return None if self.problems else made

    def _only(self, given: Mapping[Any, Any], known: list[str], where: str) -> None:
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                self.problems.append(f"unknown key {where}{key}; {hint}")

    def _text(self, key: str, default: str | None = None) -> str:
        value = self.content.get(key, default)
        if not isinstance(value, str) or (default is None and not value):
            self.problems.append(f"{key}: expected text, got {value!r}")
            return ""
        return value

    def _number(self, value: Any, name: str, below: float | None = None) -> float:
        ok = type(value) in (int, float) and 0 < value < (below or float("inf"))
        if not ok:
            limit = f" and less than {below}" if below else ""
            self.problems.append(f"{name} = {value!r} must be a number greater than 0{limit}")
        return float(value) if ok else 1.0

    def _settings(self, given: Any, name: str) -> dict[str, Any]:
        if not isinstance(given, dict):
            self.problems.append(f"{name}: expected a mapping of section.key to values, got {given!r}")
            return {}
        for key in given:
            if not re.fullmatch(r"\w+(\.\w+)+", str(key)):
                self.problems.append(f"{name}: {key!r} must have the form section.key")
            if key in ("run.name", "run.directory", "run.seed", "run.overwrite"):
                self.problems.append(f"{name} must not set {key}: it follows from `out`, the arm and the seed")
        return {str(key): value for key, value in given.items()}

    def _arms(self) -> dict[str, dict[str, Any]]:
        given = self.content.get("arms")
        if not isinstance(given, dict) or len(given) < 2:
            self.problems.append(f"arms: expected a mapping of at least two names to settings, got {given!r}")
            return {}
        for name in given:
            if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", str(name), re.ASCII) or re.search(r"-seed\d+$", str(name)):
                self.problems.append(
                    f"arms: the name {name!r} must consist of letters, digits, '.', '_' and '-', and not end in -seedN"
                )
        return {str(name): self._settings(values or {}, f"arms.{name}") for name, values in given.items()}

    def _pairs(self, arms: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        given = self.content.get("pairs")
        if not isinstance(given, list) or not given:
            self.problems.append(
                f"pairs: expected a list such as [[{', '.join([*arms, 'a', 'b'][:2])}]], got {given!r}"
            )
            return ()
        found: list[tuple[str, str]] = []
        for pair in given:
            if not (isinstance(pair, list) and len(pair) == 2 and {str(name) for name in pair} <= arms.keys()):
                self.problems.append(f"pairs: {pair!r} must be two of the arms {', '.join(arms)}")
                continue
            a, b = str(pair[0]), str(pair[1])
            if a == b or (a, b) in found or (b, a) in found:
                self.problems.append(f"pairs: {pair!r} must be two different arms, each pair once")
            found.append((a, b))
        return tuple(found)

    def _seeds(self) -> tuple[int, ...]:
        given = self.content.get("seeds")
        if type(given) is int and 2 <= given <= MOST_SEEDS:
            return tuple(range(1, given + 1))
        seeds: list[Any] = given if isinstance(given, list) else []
        legal = all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
        if legal and 2 <= len(set(seeds)) == len(seeds) <= MOST_SEEDS:
            return tuple(seeds)
        self.problems.append(
            f"seeds = {given!r} must be a number of seeds from 2 to {MOST_SEEDS}, or a list of at least two different "
            "ones: a single pair has no spread, so nothing can be tested"
        )
        return ()

    def _endpoints(self) -> tuple[Endpoint, ...]:
        given = self.content.get("endpoints")
        if given is None:
            return SCORE, LENGTH
        if not isinstance(given, dict) or not given:
            self.problems.append(f"endpoints: expected a mapping of names to metrics, got {given!r}")
            return ()
        return tuple(self._endpoint(str(name), values) for name, values in given.items())

    def _endpoint(self, name: str, given: Any) -> Endpoint:
        default = {e.name: e for e in (SCORE, LENGTH)}.get(name)
        where = f"endpoints.{name}"
        if not isinstance(given, dict):
            self.problems.append(f"{where}: expected a mapping with metric, last and smallest, got {given!r}")
            return default or SCORE
        names = [field.name for field in fields(Endpoint) if field.name != "name"]
        self._only(given, names, f"{where}.")
        values = {**({n: getattr(default, n) for n in names} if default else {"log": False}), **given}
        metric, last, log = values.get("metric"), values.get("last"), values["log"]
        if not isinstance(metric, str) or entry_of(metric) is None:
            near = difflib.get_close_matches(str(metric), METRICS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            self.problems.append(f"{where}.metric = {metric!r} must be a metric of docs/metrics.md{hint}")
        if type(last) is not int or last < 1:
            self.problems.append(f"{where}.last = {last!r} must be a number of values, at least 1")
        if type(log) is not bool:
            self.problems.append(f"{where}.log = {log!r} must be true or false")
        smallest = self._number(values.get("smallest"), f"{where}.smallest")
        return Endpoint(name, str(metric), last if type(last) is int else 1, smallest, bool(log))
