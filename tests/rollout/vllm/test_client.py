"""Requests to several servers that fail in every way: every response arrives, once, and is the right one."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.rollout import Request, Sampling
from megatron_fipo.rollout.vllm.client import Client, ClientTimeouts
from megatron_fipo.rollout.vllm.client_state import PendingRequest, ServerState, share_of_capacity, tokens_so_far
from megatron_fipo.rollout.vllm.served_model import ServedModel
from megatron_fipo.scaling.cost.model_shapes import make_shape
from megatron_fipo.shapes.architecture import Experts
from tests.support.fake_server import KEY, FakeServer, tokens_for
from tests.support.waiting import PATIENCE, wait_until

SAMPLING = Sampling(1.0, 1.0, 0, 8, (99,))
# A busy machine must not make a server that answers look hung, nor let a response run out of time.
QUICK = ClientTimeouts(deadline=PATIENCE, wait=PATIENCE, probe=0.5, strikes=6, first=0.02, longest=0.2)
MakeClient = Callable[..., Client]


@pytest.fixture
def servers() -> Iterator[list[FakeServer]]:
    fakes = [FakeServer(), FakeServer()]
    yield fakes
    for fake in fakes:
        fake.close()


@pytest.fixture
def connect(servers: list[FakeServer]) -> Iterator[MakeClient]:
    """Makes a client of the servers that uses all of them."""
    clients: list[Client] = []

    def make(timeouts: ClientTimeouts = QUICK, concurrency: int = 64, key: str = KEY, **more: object) -> Client:
        client = Client([s.url for s in servers], [key] * len(servers), timeouts, concurrency, **more)  # type: ignore[arg-type]
        clients.append(client)
        client.expect("run-1", [True] * len(servers))
        return client

    yield make
    for client in clients:
        client.close()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_each_server_is_shown_its_own_key(kind: str, tmp_path: Path) -> None:
    """Over Unix sockets and over TCP: responses of both servers arrive, and neither learns the other one's key."""
    fakes = [FakeServer(uds=tmp_path / str(i) if kind == "unix" else None) for i in range(2)]
    for number, fake in enumerate(fakes):
        fake.key = f"key {number}"
    client = Client([s.url for s in fakes], [s.key for s in fakes], QUICK, 8)
    try:
        client.expect("run-1", [True, True])
        draw_all(client, 40)
        wait_until(lambda: all(fake.shown for fake in fakes))
    finally:
        client.close()
        for fake in fakes:
            fake.close()
    assert [set(fake.shown) for fake in fakes] == [{"Bearer key 0"}, {"Bearer key 1"}]
    assert min(fake.answered.total() for fake in fakes) > 0


def requests(count: int) -> list[Request]:
    return [Request([seed % 5, 1], seed) for seed in range(count)]


def draw_all(client: Client, count: int) -> None:
    """Each response is the one of its own seed."""
    futures = [client.submit(request, SAMPLING) for request in requests(count)]
    for request, future in zip(requests(count), futures, strict=True):
        response = future.result(timeout=PATIENCE)
        assert response.token_ids == tokens_for(request.seed, list(request.prompt_ids))
        assert response.log_probs == [-t / 100 for t in response.token_ids]
        assert response.truncated == (response.token_ids[-1] != 99)
        assert response.weight_versions == (1,)


def sent(servers: list[FakeServer]) -> list[int]:
    """How many responses each server sent."""
    return [sum(server.answered.values()) for server in servers]


def test_spread_by_outstanding_tokens(servers: list[FakeServer], connect: MakeClient) -> None:
    """Servers that answer nothing yet get equal shares, each request once; a slow one gets no more than it can have."""
    for server in servers:
        server.delay = 120.0
    client = connect(concurrency=4)
    futures = [client.submit(request, SAMPLING) for request in requests(100)]
    wait_until(lambda: [server.busy for server in servers] == [4, 4])
    servers[1].delay = 0.0
    wait_until(lambda: sent(servers) == [0, 96])
    servers[0].delay = 0.0
    wait(futures, timeout=PATIENCE)
    assert sent(servers) == [4, 96]
    assert max(server.most for server in servers) == 4


def test_cut_connections(servers: list[FakeServer], connect: MakeClient) -> None:
    """Requests whose connection is cut are sent again; no response is lost."""
    servers[0].drops, servers[1].drops = 5, 3
    draw_all(connect(), 60)
    assert servers[0].drops == servers[1].drops == 0
    assert sum(sent(servers)) == 60
    assert sum(server.asked.total() for server in servers) == 68


def test_server_that_answers_500(servers: list[FakeServer], connect: MakeClient) -> None:
    """All responses come from the other server; the broken one is tried again, but not with everything."""
    servers[0].status = 500
    for server in servers:
        server.delay = 0.01
    draw_all(connect(concurrency=2), 80)
    assert sent(servers) == [0, 80]
    assert 1 <= servers[0].asked.total() <= 30
    assert max(servers[0].asked.values()) == 1


def test_broken_server_is_used_again(servers: list[FakeServer], connect: MakeClient) -> None:
    """Once it works, a server that failed gets its share."""
    servers[0].status = 503
    client = connect(concurrency=4)
    draw_all(client, 10)
    assert sent(servers) == [0, 10]
    servers[0].status = 200
    for server in servers:
        server.delay = 0.02
    draw_all(client, 100)
    assert sent(servers)[0] >= 25


def test_only_broken_servers(servers: list[FakeServer], connect: MakeClient) -> None:
    """After a number of attempts the run ends, with the servers' own words."""
    for server in servers:
        server.status = 500
    with pytest.raises(RuntimeError, match=r"8 attempts.*500: .*broken"):
        draw_all(connect(), 1)
    assert sum(server.asked.total() for server in servers) == 8


def test_hung_server(servers: list[FakeServer], connect: MakeClient) -> None:
    """A server that stops answering is given up, and told of; its requests are drawn by the other one, once."""
    hung: list[int] = []
    for server in servers:
        server.delay = 0.05
    client = connect(on_hung=hung.append)
    futures = [client.submit(request, SAMPLING) for request in requests(40)]
    servers[0].hung = True
    wait(futures, timeout=PATIENCE)
    assert [f.result(timeout=0).token_ids for f in futures] == [
        tokens_for(r.seed, list(r.prompt_ids)) for r in requests(40)
    ]
    assert set(hung) == {0}
    assert sum(servers[1].answered.values()) >= 20
    assert max(servers[1].answered.values()) == 1


def test_server_without_engine(servers: list[FakeServer], connect: MakeClient) -> None:
    """One that answers everything with an error is told of, to be restarted."""
    hung: list[int] = []
    servers[0].status, servers[0].dead = 500, True
    client = connect(on_hung=hung.append)
    draw_all(client, 20)
    wait_until(lambda: bool(hung))
    assert set(hung) == {0}
    assert sent(servers) == [0, 20]


def test_deadline(servers: list[FakeServer], connect: MakeClient) -> None:
    """A response that takes too long is drawn anew; in the end the setting is named."""
    servers[0].delay = 1.0
    timeouts = replace(QUICK, deadline=0.3, probe=5.0)
    draw_all(connect(timeouts), 2)
    assert sent(servers)[1] == 2
    servers[1].delay = 1.0
    with pytest.raises(RuntimeError, match=r"rollout\.server\.request_timeout_seconds=0\.3"):
        draw_all(connect(timeouts), 1)


def test_other_weights_do_not_count(servers: list[FakeServer], connect: MakeClient) -> None:
    """Responses drawn with another version are drawn anew, and their server waits until it has the current one."""
    servers[0].version = "default"
    client = connect()
    draw_all(client, 30)
    assert sum(servers[1].answered.values()) == 30
    seen = servers[0].asked.total()
    draw_all(client, 30)
    assert servers[0].asked.total() == seen
    servers[0].version = "run-1"

    def is_asked() -> bool:
        draw_all(client, 30)
        return servers[0].asked.total() > seen

    wait_until(is_asked)


def test_no_server(servers: list[FakeServer], connect: MakeClient) -> None:
    """Requests wait for a server, but not for ever."""
    client = connect(replace(QUICK, wait=2.0))
    client.expect("run-1", [False, False])
    for server in servers:
        server.version = "other"
    with pytest.raises(RuntimeError, match=r"no rollout server with the current weights for 2 s"):
        draw_all(client, 3)


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (400, "400: .*broken"),
        (404, "404: is this a vLLM"),
        (403, "403: the server was not started with --enable-scale-out"),
    ],
)
def test_refused(servers: list[FakeServer], connect: MakeClient, status: int, says: str) -> None:
    """An answer that would be refused again is an error at once."""
    for server in servers:
        server.status = status
    with pytest.raises(ValueError, match=says):
        draw_all(connect(), 1)
    assert sum(server.asked.total() for server in servers) == 1


def test_wrong_key(connect: MakeClient, servers: list[FakeServer]) -> None:
    """The message names the variable to set, and not the key."""
    with pytest.raises(ValueError, match=r"401: .*MEGATRON_FIPO_VLLM_KEY") as error:
        draw_all(connect(key="wrong-key"), 1)
    assert "wrong-key" not in str(error.value)


def test_clients_share_the_servers(servers: list[FakeServer], connect: MakeClient) -> None:
    """Each server has as many requests as it runs, of two clients together, and all are answered."""
    for server in servers:
        server.delay = 120.0
    clients = [connect(concurrency=5) for _ in range(2)]
    for index, client in enumerate(clients):
        client.share_servers(index, 2)
    futures = [client.submit(request, SAMPLING) for client in clients for request in requests(40)]
    wait_until(lambda: [server.busy for server in servers] == [5, 5])
    for server in servers:
        server.delay = 0.0
    assert len({tuple(future.result(timeout=PATIENCE).token_ids) for future in futures}) > 1
    assert [server.most for server in servers] == [5, 5]


def test_more_clients_than_capacity(servers: list[FakeServer], connect: MakeClient) -> None:
    """Three clients of two servers that run one request each, one of which fails: all get their responses."""
    servers[1].status = 500
    clients = [connect(concurrency=1) for _ in range(3)]
    for index, client in enumerate(clients):
        client.share_servers(index, 3)
    for client in clients:
        draw_all(client, 5)


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 12))
def test_shares_of_capacity(servers: int, capacity: int, clients: int) -> None:
    """The shares of all clients are each server's capacity, and differ by one at most; where there are more clients
    than that, each still has one request at one server."""
    states = [ServerState(number, "", None) for number in range(servers)]  # type: ignore[arg-type]
    shares = [share_of_capacity(states, capacity, client, clients) for client in range(clients)]
    assert all(sum(share.values()) >= 1 for share in shares)
    if servers * capacity >= clients:
        for state in states:
            of_clients = [share[state] for share in shares]
            assert sum(of_clients) == capacity
            assert max(of_clients) - min(of_clients) <= 1
    else:
        assert all(sum(share.values()) == 1 for share in shares)


def test_waiting_does_not_count_as_generating(servers: list[FakeServer], connect: MakeClient) -> None:
    """A response that waits for longer than its deadline before it is sent is sent once, and not refused."""
    timeouts = replace(QUICK, deadline=3.0)
    client = connect(timeouts)
    client.expect(None)
    futures = [client.submit(request, SAMPLING) for request in requests(10)]
    time.sleep(timeouts.deadline + 0.2)
    client.expect("run-1", [True, True])
    assert [f.result(timeout=PATIENCE).token_ids for f in futures] == [
        tokens_for(r.seed, list(r.prompt_ids)) for r in requests(10)
    ]
    assert sum(server.asked.total() for server in servers) == 10


def test_tokens_of_cancelled_responses(servers: list[FakeServer], connect: MakeClient) -> None:
    """They are unknown until a response is finished, and then estimated from its speed and the time since each was
    sent, up to the longest; those that were not sent have none."""
    client = connect(concurrency=1)
    servers[0].delay = servers[1].delay = 120.0
    futures = [client.submit(request, SAMPLING) for request in requests(4)]
    wait_until(lambda: all(server.busy for server in servers))
    assert client.cancel(futures) == 0
    assert all(future.cancelled() for future in futures)
    servers[0].delay = servers[1].delay = 0.01
    draw_all(client, 20)
    servers[0].delay = servers[1].delay = 120.0
    futures = [client.submit(request, SAMPLING) for request in requests(4)]
    wait_until(lambda: all(server.busy for server in servers))
    time.sleep(1.0)  # at some hundred tokens a second both have had the time for the longest
    assert client.cancel(futures) == 2 * SAMPLING.max_tokens


def test_estimate_of_tokens() -> None:
    """Speed times time, by the server's own speed or, before it has one, that of the others."""
    loop = asyncio.new_event_loop()
    known, new = (ServerState(number, "", None) for number in range(2))  # type: ignore[arg-type]
    known.speed = 10.0

    def pending(server: ServerState | None) -> PendingRequest:
        request = PendingRequest(tokens=120, max_tokens=100, sent_at=5.0)
        request.waiting = loop.create_future()
        if server is not None:
            request.waiting.set_result(server)
        return request

    assert tokens_so_far(pending(known), [10.0, 30.0], now=7.55) == 25
    assert tokens_so_far(pending(new), [10.0, 30.0], now=7.55) == 51
    assert tokens_so_far(pending(known), [10.0], now=50.0) == 100
    assert tokens_so_far(pending(None), [10.0], now=50.0) == 0
    assert tokens_so_far(pending(new), [], now=50.0) == 0
    loop.close()


def test_cancel(servers: list[FakeServer], connect: MakeClient) -> None:
    """A cancelled request frees its place; waiting and running ones alike."""
    for server in servers:
        server.delay = 120.0
    client = connect(concurrency=1)
    futures = [client.submit(request, SAMPLING) for request in requests(10)]
    wait_until(lambda: all(server.busy for server in servers))
    for future in futures:
        future.cancel()
    with pytest.raises(CancelledError):
        futures[0].result(timeout=PATIENCE)
    for server in servers:
        server.delay = 0.0
    draw_all(client, 10)  # within 30 seconds, the time that it waits for each response


def test_without_seeds(servers: list[FakeServer], connect: MakeClient) -> None:
    """The servers are told none."""
    client = connect(seeded=False)
    wait([client.submit(request, SAMPLING) for request in requests(5)])
    assert sum((server.asked for server in servers), Counter()) == {None: 5}


def test_pause(servers: list[FakeServer], connect: MakeClient) -> None:
    """The tokens so far come back at once: a whole response, the beginning of one, or nothing."""
    client, other = connect(concurrency=2), connect()
    finished = client.submit(requests(1)[0], SAMPLING)
    finished.result(timeout=PATIENCE)
    for server in servers:
        server.delay = 120.0
    wanted = requests(20)[1:]
    futures = [client.submit(request, SAMPLING) for request in wanted]
    of_another_rank = other.submit(requests(30)[-1], SAMPLING)
    wait_until(lambda: sum(server.busy for server in servers) == 5)
    client.pause([finished, *futures])
    assert not finished.result().unfinished
    begun = 0
    for request, future in zip(wanted, futures, strict=True):
        response, whole = future.result(timeout=0), tokens_for(request.seed, list(request.prompt_ids))
        assert response.unfinished
        assert not response.truncated
        assert response.token_ids == whole[: len(response.token_ids)]
        assert len(response.log_probs) == len(response.token_ids)
        assert response.weight_versions == (1,) * bool(response.token_ids)
        begun += len(response.token_ids) > 0
    assert 1 <= begun <= 4
    assert sum(server.asked.total() for server in servers) == 6  # those that waited were never sent
    assert not of_another_rank.done()
    for server in servers:
        server.delay = 0.0
    assert not of_another_rank.result(timeout=PATIENCE).unfinished
    draw_all(client, 10)


def test_pause_with_a_server_that_fails(servers: list[FakeServer], connect: MakeClient) -> None:
    """Its responses are not begun anew: they come back with nothing."""
    for server in servers:
        server.delay = 2.0
    client = connect(on_hung=lambda number: None)
    futures = [client.submit(request, SAMPLING) for request in requests(10)]
    wait_until(lambda: sum(server.busy for server in servers) == 10)
    servers[0].hung = True
    servers[1].status = 500
    client.pause(futures)
    assert all(f.result().unfinished and not f.result().token_ids for f in futures)
    assert sum(server.asked.total() for server in servers) == 10


ROUTED = ServedModel(routed=make_shape(2, 8, 8, 1, 1, 100, experts=Experts(4, 2, 8, True)))


def encoded(inputs: int) -> str:
    """Return the routing of so many tokens: experts 0 and 3 in layer 0, 2 and 1 in layer 1."""
    with io.BytesIO() as file:
        np.save(file, np.array([[[0, 3], [2, 1]]] * inputs, dtype=np.uint8))
        return base64.b64encode(file.getvalue()).decode()


def test_responses_come_with_their_routing(servers: list[FakeServer], connect: MakeClient) -> None:
    """A server that sends it for one token too few is not used; the other one's responses have a row for each input."""
    servers[0].routing, servers[1].routing = (lambda inputs: encoded(inputs - 1)), encoded
    client = connect(model=ROUTED)
    futures = [client.submit(request, SAMPLING) for request in requests(20)]
    for request, future in zip(requests(20), futures, strict=True):
        response = future.result(timeout=PATIENCE)
        assert response.routing is not None
        inputs = len(request.prompt_ids) + len(response.token_ids) - 1
        assert response.routing.tolist() == [[[0, 3], [2, 1]]] * inputs


def test_a_server_without_routing_is_refused(servers: list[FakeServer], connect: MakeClient) -> None:
    """At once, with what to do: its next responses would lack it, too."""
    client = connect(model=ROUTED)
    with pytest.raises(ValueError, match=r"refuses a request: .*start it with --enable-return-routed-experts"):
        client.submit(requests(1)[0], SAMPLING).result(timeout=PATIENCE)
    assert sum(server.asked.total() for server in servers) == 1
