"""Answers of control routes: JSON, nothing, and what is neither."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.rollout.vllm import update
from megatron_fipo.rollout.vllm.control import Control, ControlError
from megatron_fipo.rollout.vllm.transport import FileTransport
from tests.support.fake_server import KEY, FakeServer

SECONDS = 30.0
UPDATE_ROUTES = (
    *("/pause", "/update_weight_version", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights"),
    *("/finish_weight_update", "/reset_prefix_cache", "/resume"),
)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer("run-1")
    yield fake
    fake.close()


@pytest.fixture
def control(server: FakeServer) -> Iterator[Control]:
    control = Control(server.url, KEY)
    yield control
    control.close()


@pytest.mark.parametrize(
    ("body", "expected"), [(b'{"status": "paused"}', {"status": "paused"}), (b"{}", {}), (b"", {}), (b" \n", {})]
)
def test_json_objects_and_empty_bodies(server: FakeServer, control: Control, body: bytes, expected: Any) -> None:
    """An object as it is; an empty body is an empty object."""
    server.bodies["/pause"] = body
    assert control.post("/pause", timeout=SECONDS) == expected


@pytest.mark.parametrize("body", [b"<html>", b"[1]", b"\xff\xfe", b"null"])
def test_anything_else_is_an_error_of_the_server(server: FakeServer, control: Control, body: bytes) -> None:
    """It is a ControlError, which costs a restart of that server, and not the ValueError of bad input."""
    server.bodies["/pause"] = body
    with pytest.raises(ControlError, match=r"/pause answered .*expected a JSON object or nothing"):
        control.post("/pause", timeout=SECONDS)


def test_a_whole_update_on_empty_bodies(server: FakeServer, control: Control, tmp_path: Path) -> None:
    """A server that answers nothing but 200 to every route gets its weights and their version."""
    server.bodies = dict.fromkeys(UPDATE_ROUTES, b"")
    send = update.Update(FileTransport(tmp_path / "weights", 0, 1), "run-2", {0: (control, 1)}, checked=False)
    send.run(iter([("a", torch.ones(3))]), 100)
    assert (send.failures, send.problem, server.version) == ({}, None, "run-2")


def test_a_cache_that_was_not_reset(server: FakeServer, control: Control) -> None:
    """The server keeps the version that counts for nothing: it would mix old weights' cache with new weights."""
    server.bodies["/reset_prefix_cache"] = b'{"success": false}'
    update.begin(control)
    with pytest.raises(ControlError, match="still holds a cache of the old weights"):
        update.complete(control, "run-2", checked=False)
    assert server.version == "unfinished"


def _sleep(control: Control) -> None:
    control.sleep(SECONDS)


def _wake_up(control: Control) -> None:
    control.wake_up(SECONDS)


@pytest.mark.parametrize(
    ("action", "body", "sleeping", "problem"),
    [
        (_sleep, b'{"status": "sleeping", "level": 2}', None, None),
        (_sleep, b'{"status": "awake"}', None, "/sleep: the server is 'awake'"),
        (_sleep, b"", True, None),
        (_sleep, b"", False, "/sleep: the server is 'awake'"),
        (_wake_up, b'{"status": "awake", "tags": null}', None, None),
        (_wake_up, b'{"status": "sleeping", "tags": null}', None, "/wake_up: the server is 'sleeping'"),
        (_wake_up, b"", False, None),
        (_wake_up, b"", True, "/wake_up: the server is 'sleeping'"),
    ],
)
def test_sleep_and_wake_up_are_believed_only_when_they_say_so(
    server: FakeServer,
    control: Control,
    action: Callable[[Control], None],
    body: bytes,
    sleeping: bool | None,
    problem: str | None,
) -> None:
    """The status of the answer counts; where there is none, the server is asked."""
    server.bodies["/sleep"] = server.bodies["/wake_up"] = body
    if sleeping is None:  # not asked
        server.bodies["/is_sleeping"] = b"never"
    else:
        server.sleeping = sleeping
    if problem is None:
        action(control)
    else:
        with pytest.raises(ControlError, match=problem):
            action(control)


@pytest.mark.parametrize("route", ["/weight_info", "/get_world_size"])
def test_an_answer_that_is_needed(server: FakeServer, control: Control, route: str) -> None:
    """Where a value is asked for, an empty body is an error that names the route."""
    server.bodies[route] = b""
    ask = {"/weight_info": control.version, "/get_world_size": control.world_size}[route]
    with pytest.raises(ControlError, match=f"{route} answered nothing, expected"):
        ask(SECONDS)


def test_a_check_without_results(server: FakeServer, control: Control) -> None:
    """Asked to compare its weights, a server that answers nothing has not passed."""
    server.bodies["/collective_rpc"] = b""
    with pytest.raises(ControlError, match="/collective_rpc answered nothing, expected 'results'"):
        control.loaded(SECONDS)
