"""Requests that pass a server's key check without the key, and answers that a server may give."""

from __future__ import annotations

import base64
import io
import json
import os
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_fipo.rollout import Request, Response, Sampling
from megatron_fipo.rollout.vllm import ServedModel
from megatron_fipo.rollout.vllm.answer import Fault, Refused, Stale, read
from megatron_fipo.scaling.cost.model_shapes import make_shape
from megatron_fipo.shapes.architecture import Experts
from tests.fuzz.inputs import Deep, changed, json_values
from tests.rollout.vllm.test_access import ask

pytestmark = pytest.mark.slow  # two minutes for all targets

HEADERS = st.tuples(
    st.sampled_from([b"authorization", b"Authorization", b"cookie", b"x-api-key", b"proxy-authorization"]),
    st.one_of(
        st.binary(max_size=20),
        st.sampled_from([b"Bearer ", b"bearer secret", b"Bearer secret ", b"Basic secret", b"secret"]),
    ),
)
PATHS = st.one_of(
    st.text(max_size=10),
    st.sampled_from(["/health", "/health/", "//health", "/Health", "/health?x", "/v1/../health", "/HEALTH%00"]),
)


@settings(max_examples=150)
@given(st.sampled_from(["http", "websocket", "lifespan", "webtransport"]), PATHS, st.lists(HEADERS, max_size=3))
def test_without_the_key(kind: str, path: str, headers: list[tuple[bytes, bytes]]) -> None:
    """Without the right header only /health and the server's own start and end pass."""
    os.environ["VLLM_API_KEY"] = "secret"
    try:
        passed, sent = ask({"type": kind, "path": path, "headers": headers})
    finally:
        del os.environ["VLLM_API_KEY"]
    assert passed == (kind == "lifespan" or (kind == "http" and path == "/health"))
    assert passed or sent


SAMPLING = Sampling(1.0, 1.0, 0, 4, (9,))
REQUEST = Request([3], seed=1)
MODEL = ServedModel(50)
ROUTED = ServedModel(50, make_shape(1, 8, 8, 1, 1, 50, experts=Experts(4, 2, 8, True)))
CHOICE = {
    "token_ids": [1, 9],
    "logprobs": {"content": [{"logprob": -0.5}, {"logprob": -1}]},
    "finish_reason": "stop",
    "weight_versions": [{"version": "run-3", "start": 0, "end": 2}],
}


def _experts() -> str:
    """Return the routing of two tokens by one layer, as a server sends it."""
    with io.BytesIO() as file:
        np.save(file, np.array([[[0, 3]], [[2, 1]]], np.uint8))
        return base64.b64encode(file.getvalue()).decode()


answers = st.one_of(json_values, changed(CHOICE).map(lambda choice: {"choices": [choice]}))
routing = st.one_of(json_values, st.binary(max_size=200).map(lambda data: base64.b64encode(data).decode()))


@settings(max_examples=200)
@given(answers, st.booleans(), st.just(""))
@example({"choices": [CHOICE]}, False, "")
@example({"choices": [{**CHOICE, "token_ids": [1, 50]}]}, False, "")
@example({"choices": [{**CHOICE, "token_ids": [True, 9]}]}, False, "")
@example({"choices": [{**CHOICE, "token_ids": [1] * 5, "logprobs": {"content": [{"logprob": 0}] * 5}}]}, False, "")
@example({"choices": [{**CHOICE, "weight_versions": [{"version": None}]}]}, False, "")
@example({"choices": [{**CHOICE, "logprobs": {"content": [{"logprob": "x"}, {"logprob": 10**400}]}}]}, False, "")
@example(None, True, Deep())
def test_answers(content: Any, paused: bool, text: str) -> None:
    """A response of tokens that there are, or a fault, stale weights or numbers that are not finite."""
    answer = httpx.Response(200, text=text or json.dumps(content))
    try:
        found = read(answer, REQUEST, SAMPLING, "run-3", paused, MODEL)
    except (Fault, Stale, FloatingPointError):
        return
    assert isinstance(found, Response)
    assert len(found.token_ids) == len(found.log_probs) <= 4
    assert all(type(token) is int and 0 <= token < 50 for token in found.token_ids)


@settings(max_examples=200)
@given(routing, st.integers(0, 300), st.binary(max_size=4))
@example(_experts(), 0, b"")
def test_routing(routed: Any, at: int, inserted: bytes) -> None:
    """Whatever is sent as routing, or is changed in it: two tokens with two different experts of four, or a fault."""
    data = bytearray(base64.b64decode(_experts()))
    data[at : at + len(inserted)] = inserted
    for sent in (routed, base64.b64encode(data).decode()):
        answer = httpx.Response(200, text=json.dumps({"choices": [{**CHOICE, "routed_experts": sent}]}))
        try:
            found = read(answer, REQUEST, SAMPLING, "run-3", False, ROUTED).routing
        except (Fault, Refused):
            continue
        assert found is not None
        assert found.shape == (2, 1, 2)
        assert all(len({*experts} & {0, 1, 2, 3}) == 2 for token in found.tolist() for experts in token)
