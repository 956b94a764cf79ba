"""One replica's groups in the background: how many are begun, what becomes of them when they are stopped."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from megatron_fipo.batch import Rollouts
from megatron_fipo.batching.background import Discarded, Group, GroupSampler, PartialResponse
from megatron_fipo.batching.plan import InFlightPlan, InformativeShare
from megatron_fipo.batching.saved_groups import packed, unpacked
from megatron_fipo.data import Prompt
from megatron_fipo.rollout import Request, Response, Sampling
from tests.support.waiting import wait_until

SAMPLING = Sampling(1.0, 1.0, 0, 5, (0,))


class Manual:
    """Requests wait until the test answers them."""

    through_first_rank = True
    held_version = 1

    def __init__(self) -> None:
        self.requests: list[tuple[Request, Sampling, Future[Response]]] = []

    def submit(self, request: Request, sampling: Sampling) -> Future[Response]:
        future: Future[Response] = Future()
        self.requests.append((request, sampling, future))
        return future

    def load_weights(self, weights: Any) -> None:
        raise AssertionError("the source loads no weights")

    def generate(self, requests: Any, sampling: Sampling) -> list[Response]:
        raise AssertionError("the source waits for nothing")

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass

    def cancel(self, futures: Any) -> int:
        """Each response has ten tokens by now."""
        for future in futures:
            future.cancel()
        return 10 * len(futures)

    def share_servers(self, client: int, clients: int) -> int:
        raise AssertionError("the sampler does not know of other clients")

    def pause(self, futures: Any) -> None:
        """Each response has as many tokens as its request's place, five at most."""
        for place, (_, _, future) in enumerate(self.requests):
            if future in futures:
                self.answer(place, list(range(1, 6))[:place], unfinished=True)

    def answer(self, place: int, tokens: list[int], version: int = 7, unfinished: bool = False) -> None:
        future = self.requests[place][2]
        future.set_result(Response(tokens, [-1.0] * len(tokens), False, (version,) * bool(tokens), unfinished))


@pytest.fixture
def engine() -> Manual:
    return Manual()


@pytest.fixture
def source(engine: Manual) -> Iterator[GroupSampler]:
    """Groups of two; informative if their number is even."""

    def score(group: Group) -> Rollouts:
        return group.rollouts().replace(accuracy=torch.full((2,), float(group.number % 2 == 0)))

    source = GroupSampler(
        engine,
        SAMPLING,
        group_size=2,
        seed=lambda response, have: 100 * response + have,
        score=score,
        informative=lambda rollouts: bool(rollouts.accuracy[0]),
    )
    yield source
    source.close()


def _prompts(first: int = 0) -> Iterator[tuple[int, Prompt]]:
    return ((n, Prompt(n, [], [50 + n], "", "")) for n in itertools.count(first))


def _finish(source: GroupSampler, engine: Manual, places: range) -> None:
    for place in places:
        engine.answer(place, [9, 0])
    seen: dict[int, Rollouts] = {}
    wait_until(lambda: bool(seen.update(source.take())) or 2 * len(seen) == len(places))


def _plan(first: int = 0, needed: int = 2, most: int = 3, **more: Any) -> InFlightPlan:
    """Half of all groups are informative."""
    return InFlightPlan(first, needed, InformativeShare(0.5, weight=1000), most, **more)


def _kept_plan(first: int = 0) -> InFlightPlan:
    return _plan(first, needed=4, keeps_surplus=True)


def test_begins_and_cancels_by_the_plan(source: GroupSampler, engine: Manual) -> None:
    """Three groups are kept in flight until two informative ones are scored; then those behind them are cancelled at
    once, also while one before them is in flight, and none is begun any more."""
    source.start(_prompts(), version=0, oldest=0, plan=_plan(), capacity=100)
    assert [r.prompt_ids for r, _, _ in engine.requests] == [[50], [50], [51], [51], [52], [52]]
    assert [r.seed for r, _, _ in engine.requests] == [0, 100, 200, 300, 400, 500]
    _finish(source, engine, range(4, 6))  # group 2, informative
    assert len(engine.requests) == 8
    _finish(source, engine, range(2))  # group 0
    assert len(engine.requests) == 8
    assert [future.cancelled() for _, _, future in engine.requests] == [False] * 6 + [True] * 2
    assert [not future.done() for _, _, future in engine.requests[2:4]] == [True] * 2
    _finish(source, engine, range(2, 4))
    assert len(engine.requests) == 8
    assert source.stop(behind=3, keep=False) == Discarded(1, 20)


def test_outcomes_of_other_replicas(source: GroupSampler, engine: Manual) -> None:
    """A replica begins its share. What the others have finished counts: groups that are missing before theirs are
    begun, and those behind two informative ones are cancelled at once."""
    prompts = ((n, prompt) for n, prompt in _prompts() if n % 2 == 0)
    source.start(prompts, 0, 0, _plan(most=4, replica=0, replicas=2), 100)
    assert [r.prompt_ids for r, _, _ in engine.requests] == [[50], [50], [52], [52]]
    source.join({3: True, 5: False})
    assert [r.prompt_ids for r, _, _ in engine.requests[4:]] == [[54], [54]]
    engine.answer(4, [8, 8, 0])
    source.join({1: True})
    assert [future.cancelled() for _, _, future in engine.requests] == [False] * 5 + [True]
    assert not any(future.done() for _, _, future in engine.requests[:4])
    assert source.stop(behind=4, keep=False) == Discarded(1, 3 + 10)


def test_one_group_waits(source: GroupSampler, engine: Manual) -> None:
    """Groups are begun while fewer requests are in flight than the engine samples at a time and a group has, each as a
    whole; the next one when a response is finished, not only when a group is."""
    source.start(_prompts(), 0, 0, _plan(), capacity=1)
    assert len(engine.requests) == 4
    engine.answer(0, [9, 0])
    source.join({})
    assert len(engine.requests) == 4
    engine.answer(2, [9, 0])
    source.join({})
    assert len(engine.requests) == 6


def test_limit(source: GroupSampler, engine: Manual) -> None:
    """No group from the limit on is begun."""
    source.start(_prompts(), 0, 0, _plan(limit=2), 100)
    assert len(engine.requests) == 4


def test_unfinished_groups_may_count(source: GroupSampler, engine: Manual) -> None:
    """Unfinished groups count as informative where they will be kept."""
    source.start(_prompts(), 0, 0, _plan(keeps_surplus=True), 100)
    assert len(engine.requests) == 4


def test_cancelled(source: GroupSampler, engine: Manual) -> None:
    """Stopping cancels what is under way and counts it, with the tokens of finished and of running responses; groups
    before the end of the batch are no loss."""
    source.start(_prompts(), 0, 0, _plan(), 100)
    _finish(source, engine, range(2))
    engine.answer(2, [4, 4, 0])
    assert source.stop(behind=1, keep=False) == Discarded(3, 3 + 5 * 10)
    assert [future.cancelled() for _, _, future in engine.requests] == [False] * 3 + [True] * 5
    assert source.groups() == []


def test_paused_and_continued(source: GroupSampler, engine: Manual) -> None:
    """A paused response goes on with its tokens as prompt, the rest of its length and a seed of its own; its tokens
    have the versions of their time. One that is full is finished, and truncated."""
    source.start(_prompts(), 0, 0, _kept_plan(), 100)
    _finish(source, engine, range(2))  # group 3 begins: requests 6 and 7, whose pauses are at five tokens
    assert source.stop(behind=1, keep=True) == Discarded()
    kept = source.groups()
    assert [g.number for g in kept] == [1, 2, 3]
    assert [[len(d.tokens) for d in g.responses] for g in kept] == [[2, 3], [4, 5], [5, 5]]
    assert [[d.finished for d in g.responses] for g in kept] == [[False, False], [False, True], [True, True]]
    assert all(d.truncated for d in kept[2].responses)
    before = len(engine.requests)
    source.start(_prompts(1), version=1, oldest=0, plan=_kept_plan(1), capacity=100)
    request, sampling, _ = engine.requests[before]
    assert (list(request.prompt_ids), request.seed, sampling.max_tokens) == ([51, 1, 2], 202, 3)
    engine.answer(before, [8, 0], version=8)
    engine.answer(before + 1, [0], version=8)
    scored: dict[int, Rollouts] = {}
    wait_until(lambda: bool(scored.update(source.take())) or {1, 3} <= set(scored))
    assert scored[1].tokens.tolist() == [51, 1, 2, 8, 0, 51, 1, 2, 3, 0]
    assert scored[1].weight_versions.tolist() == [-1, 0, 0, 1, 1, -1, 0, 0, 0, 1]


def test_too_old_starts_over(source: GroupSampler, engine: Manual) -> None:
    """A kept group with a token of an older version than allowed is sampled again as a whole, with its first seeds; its
    tokens are counted as lost."""
    source.start(_prompts(), 0, 0, _kept_plan(), 100)
    source.stop(behind=1, keep=True)
    before = len(engine.requests)
    source.start(_prompts(1), version=2, oldest=1, plan=_kept_plan(1), capacity=100)
    assert [r.seed for r, _, _ in engine.requests[before : before + 4]] == [200, 300, 400, 500]
    assert all(sampling.max_tokens == 5 for _, sampling, _ in engine.requests[before:])
    assert source.stop(behind=1, keep=True) == Discarded(groups_too_old=2, tokens_too_old=2 + 3 + 4 + 5)


def test_weights_that_change_in_between(source: GroupSampler, engine: Manual) -> None:
    """Two responses of one batch by two versions of the engine are an error."""
    source.start(_prompts(), 0, 0, _plan(), 100)
    engine.answer(0, [0], version=7)
    engine.answer(1, [0], version=8)
    with pytest.raises(RuntimeError, match="weights number 8 and others with number 7"):
        wait_until(lambda: source.take() is None)


def test_engine_that_fails(source: GroupSampler, engine: Manual) -> None:
    """Its error comes out of `take`, also when the engine itself has ended a request."""
    source.start(_prompts(), 0, 0, _plan(), 100)
    engine.requests[0][2].set_exception(RuntimeError("no rollout server"))
    with pytest.raises(RuntimeError, match="no rollout server"):
        wait_until(lambda: source.take() is None)


def _pieces() -> tuple[PartialResponse, torch.Tensor]:
    """A response to a prompt of 2 tokens, sampled in four pieces of 0, 3, 0 and 2 tokens; the routing it must have."""
    partial = PartialResponse()
    old, new = torch.zeros(4, 1, 2, dtype=torch.int8), torch.ones(6, 1, 2, dtype=torch.int8)
    partial.extend(Response([], [], False, unfinished=True), 0, 9)
    partial.extend(Response([5, 6, 7], [-1.0] * 3, False, unfinished=True, routing=old), 1, 9)
    partial.extend(Response([], [], False, unfinished=True), 2, 9)
    partial.extend(Response([8, 0], [-1.0] * 2, False, routing=new), 3, 9)
    return partial, torch.cat([old, new[4:]])


def test_pieces_keep_the_routing_that_they_were_sampled_with() -> None:
    """The last token of a piece is computed with the next one, and has its routing; and a checkpoint keeps it."""
    partial, expected = _pieces()
    assert partial.routing is not None
    assert torch.equal(partial.routing, expected)
    group = Group(3, Prompt(3, [], [50, 51], "", ""), [partial, PartialResponse()])
    (restored,) = unpacked([packed([group])], 2, iter([(3, group.prompt)]))
    assert restored.responses[0].routing is not None
    assert torch.equal(restored.responses[0].routing, expected)
    assert restored.responses[1].routing is None  # it has no token yet
    assert restored.rollouts().routing[:, 0, 0].tolist() == [*expected[:, 0, 0].tolist(), -1, -1, -1]
