"""Body of a generation request, and reader of its response (vLLM's /inference/v1/generate: tokens in, tokens out)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import httpx
import torch

from megatron_fipo.rollout import routing
from megatron_fipo.rollout.protocol import Request, Response, Sampling
from megatron_fipo.rollout.vllm.served_model import ServedModel
from megatron_fipo.rollout.vllm.versions import number_of
from megatron_fipo.shapes.architecture import Architecture


class Refused(Exception):
    """The request or the key is wrong; sending it again would not help."""


class Fault(Exception):
    """The server failed; another attempt may succeed."""


class Stale(Exception):
    """At least a part was sampled with other weights than the current ones."""


def payload(request: Request, sampling: Sampling, name: str, seeded: bool) -> dict[str, Any]:
    """Return the body of a generation request."""
    return {
        "request_id": name,
        "token_ids": list(request.prompt_ids),
        "sampling_params": {
            "n": 1,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": sampling.max_tokens,
            "seed": request.seed if seeded else None,
            "stop_token_ids": list(sampling.stop_token_ids),
            "ignore_eos": True,  # only the given stop tokens end a response
            "logprobs": 0,  # only the sampled token's
            "detokenize": False,
        },
    }


def engine_names(names: Sequence[str]) -> list[str]:
    """Return vLLM's internal names of requests, without and with the prefix that its HTTP server adds."""
    return [prefix + name for name in names for prefix in ("", "generate-tokens-")]


def nothing_yet() -> Response:
    """Response to a request that was paused before its first token."""
    return Response([], [], truncated=False, unfinished=True)


def read(
    answer: httpx.Response,
    request: Request,
    sampling: Sampling,
    version: str | None,
    paused: bool,
    model: ServedModel,
) -> Response:
    """Return the response in a successful answer, or the part of it that was sampled when it was `paused`.

    Raises:
        Fault: it is not a complete response with valid tokens and, where it is asked for, their routing.
        Refused: the server returns no routing.
        Stale: a token was not sampled with `version`.
        FloatingPointError: log-probabilities are not finite.
    """
    try:
        choice = answer.json()["choices"][0]
        token_ids, reason = choice["token_ids"] or [], choice["finish_reason"]
        log_probs = [entry["logprob"] for entry in choice["logprobs"]["content"]]
        versions = [span["version"] for span in choice["weight_versions"]]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise Fault(f"an answer without {error}: {answer.text[:300]}") from None
    if problem := _problem(token_ids, log_probs, versions, sampling.max_tokens, model.vocabulary):
        raise Fault(problem)
    unfinished = paused and reason == "abort"
    if unfinished and not token_ids:
        return nothing_yet()
    whole = reason in ("stop", "length")
    if not (whole or unfinished) or not token_ids or len(log_probs) != len(token_ids):
        raise Fault(f"an incomplete response, finish reason {reason}")
    if any(v != version for v in versions) or not versions:
        raise Stale(f"weights {', '.join(versions)} instead of {version}")
    if not all(math.isfinite(p) for p in log_probs):
        raise FloatingPointError("the rollout model's log-probabilities are not finite: its weights have diverged")
    truncated = whole and token_ids[-1] not in sampling.stop_token_ids
    experts = _routing(choice, len(request.prompt_ids) + len(token_ids) - 1, model.routed) if model.routed else None
    return Response(token_ids, log_probs, truncated, tuple(number_of(v) for v in versions), unfinished, experts)


def _routing(choice: dict[str, Any], inputs: int, routed: Architecture) -> torch.Tensor:
    """Return the routing in a choice.

    Raises:
        Fault: it is not that of so many tokens.
        Refused: there is none.
    """
    text = choice.get("routed_experts")
    if text is None:
        raise Refused(
            "it returns no experts with its responses, which moe.routing_replay=rollout needs; start it with "
            "--enable-return-routed-experts"
        )
    try:
        return routing.decode(text, inputs, routed)
    except ValueError as error:
        raise Fault(str(error)) from None


def _problem(token_ids: Any, log_probs: list[Any], versions: list[Any], most: int, vocabulary: int) -> str | None:
    """Return the first invalid type or size among an answer's parts; None if all are valid."""
    if not isinstance(token_ids, list) or not all(type(t) is int and 0 <= t < vocabulary for t in token_ids):
        return f"token IDs that are not all whole numbers from 0 to {vocabulary - 1}"
    if len(token_ids) > most:
        return f"{len(token_ids)} tokens, expected at most {most}"
    if not all(isinstance(p, float) or (type(p) is int and abs(p) < 1 << 53) for p in log_probs):
        return "log-probabilities that are not all numbers"
    return None if all(isinstance(v, str) for v in versions) else "weight versions that are not all strings"
