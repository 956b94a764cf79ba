"""Report of a comparison: a table for a terminal of 80 columns, and JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megatron_fipo.batch import Rollouts
from megatron_fipo.config import Config
from megatron_fipo.mismatch.comparison import ComparedResponse
from megatron_fipo.mismatch.findings import FACTOR, TOKEN_FACTOR, Component, Token, components, first_beyond_rounding

_WIDTH = 80
_MARK = "<<"
_HINT = " model.dtype=float32 shows smaller faults."


@dataclass(frozen=True)
class Distance:
    """Difference of two sets of log-probabilities, nats a token."""

    between: str
    abs_mean: float
    abs_max: float


@dataclass(frozen=True)
class Report:
    """Comparison of a run's trainer with its engine.

    Attributes:
        model: the model whose layers were compared with the trainer's.
        components: in the order in which the model computes them.
        distances: of log-probabilities, from the engine's as sampled to the trainer's packed ones.
        responses: tokens, texts and log-probabilities of each response.
    """

    engine: str
    model: str
    dtype: str
    layout: str
    components: list[Component]
    distances: list[Distance]
    responses: list[dict[str, Any]]

    @property
    def first(self) -> Component | None:
        """The first component whose difference rounding does not explain."""
        return first_beyond_rounding(self.components)

    def to_json(self) -> str:
        """Return the report as JSON; infinite numbers are null."""
        first = self.first
        rule = f"times > {FACTOR:g} or token_times > {TOKEN_FACTOR:g} or unexplained > 0 or disconnected"
        content = {
            **{name: value for name, value in asdict(self).items() if name not in ("components", "responses")},
            "rule": rule,
            "first": None if first is None else first.name,
            "components": [
                {**asdict(c), "times": c.times, "beyond_rounding": c.is_beyond_rounding} for c in self.components
            ],
            "responses": self.responses,
        }
        return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"

    def lines(self) -> list[str]:
        """Return the report for a terminal."""
        tokens = sum(len(r["log_probs"]["engine"]) for r in self.responses)
        sampled = f"{len(self.responses)} responses, {tokens} response tokens"
        return [
            sampled,
            f"{self.engine} engine, {self.dtype}, {self.layout}",
            *_wrapped(f"Layers: the trainer's beside those of {self.model}.{_NOTES[self.engine]}"),
            "",
            *self._table(),
            "rel RMS: relative, root mean square over tokens; of log-probs in nats.",
            "rounding: the model's own error. times: the difference alone / rounding.",
            "",
            f"{'log-probabilities, nats a token':<58}{'mean':>10}{'max':>10}",
            *(f"{d.between:<58}{_number(d.abs_mean):>10}{_number(d.abs_max):>10}" for d in self.distances),
            "",
            *_wrapped(self._conclusion()),
        ]

    def _table(self) -> list[str]:
        experts = any(c.changed is not None for c in self.components)
        columns = ["max abs", "rel RMS", *["experts"] * experts, "rel RMS", "rounding", "times", *["experts"] * experts]
        left = 12 + 9 * (3 if experts else 2)
        rows = [" " * 12 + "whole pass".center(left - 12).rstrip().ljust(left - 12) + "  each alone, on the same input"]
        rows.append(" " * 12 + "".join(f"{column:>9}" for column in columns))
        for c in self.components:
            values = [_number(c.largest), _number(c.relative), *[_share(c.changed)] * experts]
            values += [_number(c.alone), _number(c.rounding), f"{c.times:.3g}", *[_share(c.changed_alone)] * experts]
            mark = f" {_MARK}" if c.is_beyond_rounding else ""
            rows.append(f"{c.name:<12}" + "".join(f"{value:>9}" for value in values) + mark)
        return rows

    def _conclusion(self) -> str:
        first = self.first
        if first is None:
            return (
                f"No component differs by more than rounding (alone, {FACTOR:g} times the error of {self.model} in "
                f"{self.dtype} against a wider dtype).{_HINT if self.dtype != 'float32' else ''}"
            )
        return (
            f"{_MARK} First in {first.name}: {first.reason}. Worst token: response {first.worst.response}, "
            f"{self._name(first.worst)}."
        )

    def _name(self, token: Token) -> str:
        response = self.responses[token.response]
        prompt = response["prompt_tokens"]
        inside = (
            f"prompt token {token.position}" if token.position < prompt else f"response token {token.position - prompt}"
        )
        return f"position {token.position} ({inside}), text {response['texts'][token.position]!r}"


def make_report(
    config: Config,
    tokenizer: Any,
    rollouts: Rollouts,
    responses: Sequence[ComparedResponse],
    packed: Sequence[torch.Tensor],
) -> Report:
    """Return the report of compared responses.

    Args:
        packed: the trainer's log-probabilities of each, packed as for updates.
    """
    p = config.parallel
    sampled = [
        values[prompt:]
        for values, prompt in zip(
            rollouts.rollout_log_probs.split(rollouts.lengths.tolist()), rollouts.prompt_lengths.tolist(), strict=True
        )
    ]
    return Report(
        engine=config.rollout.engine,
        model=_MODELS[config.rollout.engine],
        dtype=config.model.dtype,
        layout=f"tp {p.tensor}, pp {p.pipeline}, cp {p.context}, dp {p.data}, ep {p.expert}",
        components=components(responses),
        distances=_distances(sampled, [r.log_probs for r in responses], [r.whole.log_probs for r in responses], packed),
        responses=[
            _response(
                tokenizer,
                tokens,
                prompt,
                {"engine": s, "model": r.log_probs, "trainer": r.whole.log_probs, "packed": q},
            )
            for tokens, prompt, s, r, q in zip(
                rollouts.tokens.split(rollouts.lengths.tolist()),
                rollouts.prompt_lengths.tolist(),
                sampled,
                responses,
                packed,
                strict=True,
            )
        ],
    )


_MODELS = {
    "hf": "the engine's own transformers model",
    "vllm": "a transformers model with the servers' weights",
}
_NOTES = {"hf": "", "vllm": " A server's own layers are not visible."}


def _distances(
    sampled: Sequence[torch.Tensor],
    model: Sequence[torch.Tensor],
    trainer: Sequence[torch.Tensor],
    packed: Sequence[torch.Tensor],
) -> list[Distance]:
    pairs = {
        "engine as it sampled - trainer as in mismatch/abs_*": (sampled, packed),
        "  engine as it sampled - model on whole responses": (sampled, model),
        "  model on whole responses - trainer, one at a time": (model, trainer),
        "  trainer, one at a time - packed as for updates": (trainer, packed),
    }
    found = []
    for name, (a, b) in pairs.items():
        gap = torch.nan_to_num(
            (torch.cat(list(a)).double() - torch.cat(list(b)).double()).abs(), nan=math.inf, posinf=math.inf
        )
        found.append(Distance(name.strip(), float(gap.mean()), float(gap.max())))
    return found


def _response(tokenizer: Any, tokens: torch.Tensor, prompt: int, log_probs: dict[str, torch.Tensor]) -> dict[str, Any]:
    ids = tokens.tolist()
    return {
        "prompt_tokens": prompt,
        "tokens": ids,
        "texts": [tokenizer.decode([token]) for token in ids],
        "log_probs": {name: values.tolist() for name, values in log_probs.items()},
    }


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, break_on_hyphens=False)


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _finite(value: Any) -> Any:
    """Return JSON content with null for numbers that JSON lacks."""
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
