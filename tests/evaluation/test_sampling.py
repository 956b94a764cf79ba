"""Who draws which samples, and how responses of servers come in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.data import Prompt
from megatron_fipo.evaluation import drawing
from megatron_fipo.evaluation.drawing import Draw, responses, share, wanted
from megatron_fipo.parallel import interrupt
from megatron_fipo.rollout import Sampling
from tests.policies import make_config
from tests.rollout.streaming import ScriptedStream

SAMPLING = Sampling(1.0, 1.0, 0, 50, (9,))


def _prompts(count: int) -> list[Prompt]:
    return [Prompt(i, [{"role": "user", "content": str(i)}], [i], "test", str(i)) for i in range(count)]


def _draws(problems: int, samples: int) -> list[Draw]:
    return wanted({"b": _prompts(problems)}, make_config("unused", eval={"samples": samples}))


def test_seeds_depend_on_problem_and_number_only() -> None:
    """What is drawn of a problem is the same beside other problems, samples and benchmarks; all seeds differ."""
    config = make_config("unused", eval={"samples": 4})
    few = {d.key: d.seed for d in _draws(2, 2)}
    many = {d.key: d.seed for d in wanted({"a": _prompts(1), "b": _prompts(5)}, config)}
    assert few.items() <= many.items()
    assert len({seed for (name, *_), seed in many.items() if name == "b"}) == 20


def test_first_problems_of_each_benchmark() -> None:
    """eval.max_problems cuts each of them."""
    config = make_config("unused", eval={"samples": 1, "max_problems": 2})
    draws = wanted({"a": _prompts(3), "b": _prompts(1)}, config)
    assert [d.key for d in draws] == [("a", 0, 0), ("a", 1, 0), ("b", 0, 0)]


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 6), st.integers(1, 12), st.sets(st.integers(0, 44)))
def test_shares(problems: int, samples: int, ranks: int, batch: int, done: set[int]) -> None:
    """Every sample that is not finished is drawn by one rank, beside the same neighbours as if none were finished."""
    draws = _draws(problems, samples)
    finished = {draws[i].key for i in done if i < len(draws)}
    parts = [share(draws, finished, rank, ranks, batch) for rank in range(ranks)]
    fresh = [{d.key for d in chunk} for rank in range(ranks) for chunk in share(draws, (), rank, ranks, batch)]
    keys = [d.key for part in parts for chunk in part for d in chunk]
    assert sorted(keys) == sorted(d.key for d in draws if d.key not in finished)
    for chunk in (chunk for part in parts for chunk in part):
        assert 0 < len(chunk) <= batch
        assert {d.key for d in chunk} in [whole - finished for whole in fresh]


def test_all_ranks_have_work() -> None:
    """Fewer samples than the engine takes at once are still shared out."""
    assert [sum(map(len, share(_draws(4, 2), (), rank, 4, 256))) for rank in range(4)] == [2, 2, 2, 2]


@pytest.fixture
def engine() -> Iterator[ScriptedStream]:
    """The response to prompt n has n + 1 tokens."""
    stream = ScriptedStream(lambda request: ([1] * request.prompt_ids[0] + [9], 0), stop=9, slots=100)
    yield stream
    stream.close()


def test_responses_of_servers_come_in_as_they_are_finished(
    engine: ScriptedStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are sent at once; what is finished is handed on in the meantime, each response once and to its draw."""
    monkeypatch.setattr(drawing, "_HANDED_ON", 8)
    engine.stalls = lambda request, tokens: request.prompt_ids[0] > 20  # the long ones wait
    draws = _draws(40, 1)
    coming = responses(engine, [draws[:30], draws[30:]], SAMPLING)
    early = [pair for _ in range(2) for pair in next(coming)]
    assert len(engine.submitted) == 40
    assert 16 <= len(early) <= 21
    engine.stalls = lambda request, tokens: False
    pairs = early + [pair for some in coming for pair in some]
    assert sorted(draw.key for draw, _ in pairs) == sorted(draw.key for draw in draws)
    assert all(len(response.token_ids) == draw.key[1] + 1 for draw, response in pairs)


def test_late_responses_are_handed_on(engine: ScriptedStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few responses in a long time are not kept from the disk until there are many."""
    monkeypatch.setattr(drawing, "_HANDED_ON_SECONDS", 0.0)
    engine.stalls = lambda request, tokens: request.prompt_ids[0] > 2
    assert 1 <= len(next(responses(engine, [_draws(40, 1)], SAMPLING))) <= 3


def test_interrupted_among_servers(engine: ScriptedStream, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is under way is cancelled."""
    engine.stalls = lambda request, tokens: True
    monkeypatch.setattr(interrupt, "requested", lambda: True)
    with pytest.raises(interrupt.Interrupted):
        next(responses(engine, [_draws(40, 1)], SAMPLING))
    assert all(serving.future.cancelled() for serving in engine._serving)


def test_no_work_needs_no_engine() -> None:
    """A finished evaluation is summarized without one."""
    assert list(responses(None, [], SAMPLING)) == []
