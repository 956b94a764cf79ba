"""Batches from a stream of responses: what is in them depends on prompts and seeds, not on who finishes first."""

from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from megatron_fipo.algorithm.dynamic_sampling import DynamicSamplingExhausted
from megatron_fipo.batch import Rollouts
from megatron_fipo.config import RewardConfig
from megatron_fipo.data import Prompt, PromptSet, PromptStream
from megatron_fipo.parallel import interrupt
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.parallel.interrupt import Interrupted
from megatron_fipo.reward import make_reward
from megatron_fipo.rollout import Request
from megatron_fipo.rollout.assembly import StepBatch
from megatron_fipo.rollout.collect import RolloutCollector, derive_seed
from megatron_fipo.rollout.stream import StreamingCollector, make_collector
from tests.policies import make_config, save_tokenizer
from tests.ranks import run_ranks
from tests.rollout.scoring import collect, scorer
from tests.rollout.streaming import PausableStream, ScriptedStream, wait_until

pytestmark = pytest.mark.distributed

GROUP = 4
LIMIT = 24  # max_response_tokens
# How many of a prompt's four responses are right; prompts in file order, taken unshuffled.
RIGHT = [4, 2, 0, 1, 3, 4, 2, 0, 2, 1]
INFORMATIVE = [g for g in range(60) if 0 < RIGHT[g % len(RIGHT)] < GROUP]
BATCHES = [INFORMATIVE[at : at + 4] for at in range(0, 16, 4)]
TIMING = ("sampling/cancelled_", "sampling/continued_")


class Script:
    """Response i of a group is right if i < RIGHT[problem]; later prompts and responses are shorter or longer."""

    def __init__(self, tokenizer: Any) -> None:
        self.vocabulary = tokenizer.get_vocab()
        self.stop = tokenizer.eos_token_id
        ids = range(60 * GROUP)
        self.numbers = {derive_seed(1, "rollout", i): (i, 0) for i in ids}
        self.numbers |= {derive_seed(1, "rollout", i, have): (i, have) for i in ids for have in range(1, LIMIT)}

    def __call__(self, request: Request) -> tuple[list[int], int]:
        number, have = self.numbers[request.seed]
        tokens = self.tokens(number)
        if have:
            assert list(request.prompt_ids)[-have:] == tokens[:have], "a piece must go on where the last one ended"
        return tokens[have:], have

    def tokens(self, number: int) -> list[int]:
        group, i = divmod(number, GROUP)
        problem = group % len(RIGHT)
        answer = problem if i < RIGHT[problem] else problem + 1
        padding = (7 * group + 5 * i) % 14
        text = "+" * padding + f"Answer:{answer}"  # 8 to 22 tokens
        tokens = [self.vocabulary[c] for c in text]
        return [*tokens, self.stop]


def _prompts(tokenizer: Any) -> PromptSet:
    prompts = []
    for i in range(len(RIGHT)):
        messages = [{"role": "user", "content": f"{i}?"}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        prompts.append(Prompt(i, messages, list(ids), "digits", str(i)))
    return PromptSet(tuple(prompts), len(RIGHT), len(RIGHT), 0)


def _collector(path: Path, world: int, order: str = "first", slots: int = 8, **rollout: Any) -> StreamingCollector:
    config = make_config(
        path,
        parallel={"world_size": world},
        rollout={"prompts_per_step": 4, "group_size": GROUP, "max_response_tokens": LIMIT, **rollout},
        reward={"overlong_buffer_tokens": 4},
    )
    topology = topologies.initialize(config.parallel, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    script = Script(tokenizer)
    kind = PausableStream if config.rollout.partial else ScriptedStream
    engine = kind(script, script.stop, order, slots)
    stream = PromptStream(_prompts(tokenizer), config.run.seed, shuffle=False)
    reward = make_reward(RewardConfig(function="exact"))
    score = scorer(config, reward, tokenizer, (script.stop,))
    collector = make_collector(config, topology, engine, score, stream, (script.stop,))
    assert isinstance(collector, StreamingCollector)
    collector.engine = engine  # type: ignore[attr-defined]
    return collector


def _close(collector: StreamingCollector) -> None:
    collector.close()
    collector.engine.close()  # type: ignore[attr-defined]
    topologies.destroy()


def _collect(path: Path, world: int, steps: int, **options: Any) -> dict[str, Any]:
    """What `steps` batches hold on this rank, or the error."""
    collector = _collector(path, world, **options)
    collected: list[StepBatch] = []
    error = None
    try:
        for _ in range(steps):
            collector.engine.load_weights(iter(()))  # type: ignore[attr-defined]
            collected.append(collect(collector))
    except DynamicSamplingExhausted as exhausted:
        error = str(exhausted)
    finally:
        _close(collector)
    return {"steps": collected, "error": error}


PACES: dict[str, dict[str, Any]] = {
    "first": {"order": "first"},
    "last": {"order": "last", "slots": 3},
    "mixed": {"order": "mixed", "slots": 40, "prompts_per_round": 11},
    "one": {"slots": 1, "prompts_per_round": 1},
}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"steps": 3, **pace} for name, pace in PACES.items()},
    "no_filter": {"steps": 2, "dynamic_sampling": False, "order": "last"},
    "stop": {"steps": 1, "max_rounds": 1},
    "train": {"steps": 1, "max_rounds": 1, "when_exhausted": "train", "order": "mixed"},
}


def _ahead(path: Path, world: int) -> dict[str, Any]:
    """Two batches, each but the first drawn ahead; and what a checkpoint between them holds."""
    collector = _collector(path, world, max_staleness=1)
    engine = collector.engine  # type: ignore[attr-defined]
    batches, states = [], []
    for _ in range(2):
        ahead = None
        if collector.has_prefetched:
            collector.drain()
            states.append((collector.state_dict(), collector.kept_rollouts()))
            ahead = collect(collector)
        engine.load_weights(iter(()))
        batches.append(ahead or collect(collector))
        collector.prefetch()
    under_way = collector.state_dict()
    _close(collector)
    return {"batches": batches, "states": states, "under_way": under_way}


def _restored(path: Path, world: int, state: dict[str, Any], parts: list[dict[str, Any]]) -> list[StepBatch]:
    collector = _collector(path, world, max_staleness=1)
    collector.load_state_dict(json.loads(json.dumps(state)), parts)
    assert collector.has_prefetched
    batches = [collect(collector)]
    collector.engine.load_weights(iter(()))  # type: ignore[attr-defined]
    collector.prefetch()
    batches.append(collect(collector))
    _close(collector)
    return batches


PARTIAL: dict[str, Any] = {"partial": True, "server": {"placement": "colocated"}, "max_staleness": 1, "slots": 16}


def _partial(path: Path, world: int) -> dict[str, Any]:
    """Four batches, groups behind each of them coming no further than three tokens; what was kept after each."""
    collector = _collector(path, world, **PARTIAL)
    engine = collector.engine  # type: ignore[attr-defined]

    def behind(request: Request, tokens: int) -> bool:
        return tokens == 3 and engine.script.numbers[request.seed][0] // GROUP > BATCHES[engine.version - 1][-1]

    engine.stalls = behind
    batches, kept, states = [], [], []
    for _ in range(4):
        engine.load_weights(iter(()))
        batches.append(collect(collector))
        kept.append(collector.kept_rollouts())
        states.append(collector.state_dict())
    _close(collector)
    return {"batches": batches, "kept": kept, "states": states}


def _partial_restored(path: Path, world: int, state: dict[str, Any], parts: list[dict[str, Any]]) -> dict[str, Any]:
    collector = _collector(path, world, **PARTIAL)
    collector.load_state_dict(json.loads(json.dumps(state)), parts)
    again = collector.kept_rollouts()
    collector.engine.load_weights(iter(()))  # type: ignore[attr-defined]
    batch = collect(collector)
    _close(collector)
    return {"again": again, "batch": batch}


def _interrupted(path: Path, world: int) -> list[str]:
    """The last rank is asked to stop while nothing can be finished; afterwards nothing is under way."""
    interrupt.install()
    collector = _collector(path, world, slots=0)
    if collector.topology.rank == world - 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(Interrupted):
        collector.collect()
    engine = collector.engine  # type: ignore[attr-defined]
    wait_until(lambda: not engine._serving)
    state = collector.state_dict()
    _close(collector)
    return [str(state["next_group"]), str(state["stream"]["position"]), str(collector.has_prefetched)]


def _with_another_engine(path: Path, world: int) -> list[int]:
    """A run goes on with the other kind of collector, and back: next group, batches and prompts after each change."""
    collector = _collector(path, world)
    collector.collect()
    rounds = RolloutCollector(
        *(collector.config, collector.topology, collector.engine),  # type: ignore[attr-defined]
        *(collector.score, copy.copy(collector.stream), (0,)),
    )
    rounds.load_state_dict(json.loads(json.dumps(collector.state_dict())), [collector.kept_rollouts()] * world)
    state, part = rounds.state_dict(), rounds.kept_rollouts()
    _close(collector)
    again = _collector(path, world)
    again.load_state_dict(json.loads(json.dumps(state)), [part] * world)
    _close(again)
    seen = [c.state_dict() for c in (rounds, again)]
    return [value for s in seen for value in (s["next_group"], s["batches"], s["stream"]["position"])]


def _failing(path: Path, world: int) -> list[str]:
    """The reward raises on replica 0, in its scoring thread."""
    collector = _collector(path, world)

    def broken(*args: Any) -> Any:
        raise ZeroDivisionError("no verdict")

    if collector.topology.rank == 0:
        collector.score = broken  # type: ignore[assignment]
    with pytest.raises((ZeroDivisionError, RuntimeError)) as error:
        collector.collect()
    _close(collector)
    return [f"{type(error.value).__name__}: {error.value}"]


def _all(path: Path, world: int) -> dict[str, Any]:
    results = {name: _collect(path, world, **case) for name, case in CASES.items()}
    results |= {"ahead": _ahead(path, world), "partial": _partial(path, world)}
    results |= {"interrupted": _interrupted(path, world)}
    interrupt.install()
    return results | {"failing": _failing(path, world), "changed": _with_another_engine(path, world)}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def results(path: Path) -> dict[int, list[dict[str, Any]]]:
    """world size -> rank -> case -> what was collected."""
    return {world: run_ranks(_all, world, path, world) for world in (1, 2)}


def _whole(parts: list[Rollouts]) -> Rollouts:
    whole = Rollouts.concatenate(parts)
    return whole.select(whole.ids.argsort())


def _assert_same(parts: list[Rollouts], expected: list[Rollouts]) -> None:
    for name, values in vars(_whole(expected)).items():
        assert torch.equal(getattr(_whole(parts), name), values), name


def _steady(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.startswith(TIMING)}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("pace", PACES)
def test_batches_depend_on_prompt_order_alone(pace: str, world: int, results: dict[int, list[dict[str, Any]]]) -> None:
    """Whatever finishes first, however many are drawn at once, on one replica or two: the first informative groups in
    prompt order, with the same tokens, rewards, advantages and figures, cancelled ones apart."""
    (reference,) = results[1]
    for step in range(3):
        parts = [rank[pace]["steps"][step] for rank in results[world]]
        expected = reference["first"]["steps"][step]
        for part in parts:
            assert part.groups == expected.groups == BATCHES[step]
            for name, value in _steady(expected.metrics).items():
                if name != "sampling/rounds":  # their size differs
                    assert part.metrics[name] == pytest.approx(value, rel=1e-6), name
        _assert_same([part.rollouts for part in parts], [expected.rollouts])


def test_figures_are_of_the_prompts_that_were_passed(results: dict[int, list[dict[str, Any]]]) -> None:
    """The second batch took groups 7 to 13: their counts, lengths and rewards, whatever was begun behind them."""
    (one,) = results[1]
    metrics = one["first"]["steps"][1].metrics
    assert (metrics["sampling/prompts_generated"], metrics["sampling/rounds"]) == (7, 2)
    assert (metrics["sampling/groups_all_right"], metrics["sampling/groups_all_wrong"]) == (1, 2)
    lengths = [(7 * g + 5 * i) % 14 + 9 for g in range(7, 14) for i in range(GROUP)]
    lengths += [3]  # the wrong answer to problem 9 is 10, a digit longer
    assert metrics["response_length/mean"] == pytest.approx(sum(lengths) / (7 * GROUP))
    assert metrics["reward/accuracy"] == pytest.approx(sum(RIGHT[g % 10] for g in range(7, 14)) / (7 * GROUP))


def test_each_replica_draws_its_own(results: dict[int, list[dict[str, Any]]]) -> None:
    """Group g is drawn by replica g mod 2, and stays there until the batch is dealt."""
    for rank in results[2]:
        for step in rank["mixed"]["steps"]:
            assert step.rollouts.ids.tolist() == sorted(step.rollouts.ids.tolist())
    shares = [{int(i) // GROUP % 2 for s in r["mixed"]["steps"] for i in s.rollouts.ids} for r in results[2]]
    assert shares == [{0}, {1}]


def test_without_dynamic_sampling_every_group_is_taken(results: dict[int, list[dict[str, Any]]]) -> None:
    """Groups that are all right or all wrong stay in, also when later ones are finished first."""
    assert [step.groups for step in results[1][0]["no_filter"]["steps"]] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("world", [1, 2])
def test_exhausted(world: int, results: dict[int, list[dict[str, Any]]]) -> None:
    """After max_rounds rounds' prompts the run stops with the arithmetic, or trains on what there is."""
    for rank in results[world]:
        assert "1 generation rounds of 4 prompts gave 2 of the 4 groups" in rank["stop"]["error"]
        (batch,) = rank["train"]["steps"]
        assert batch.groups == [1, 3]
        assert batch.metrics["batch/responses"] == 2 * GROUP


@pytest.mark.parametrize("world", [1, 2])
def test_drawn_ahead(world: int, results: dict[int, list[dict[str, Any]]]) -> None:
    """The second batch has the content of one drawn when it is needed, the weights of one step before, and says so."""
    for step in range(2):
        batches = [rank["ahead"]["batches"][step] for rank in results[world]]
        expected = [rank["first"]["steps"][step].rollouts for rank in results[world]]
        _assert_same(
            [b.rollouts.replace(weight_versions=e.weight_versions) for b, e in zip(batches, expected, strict=True)],
            expected,
        )
        for batch in batches:
            versions = batch.rollouts.weight_versions
            assert set(versions[batch.rollouts.loss_mask].tolist()) == {0}
            assert set(versions[~batch.rollouts.loss_mask].tolist()) == {-1}
            assert (batch.metrics["batch/staleness"], batch.metrics["batch/staleness_max"]) == (step, step)


def test_batch_under_way_is_no_part_of_the_state(results: dict[int, list[dict[str, Any]]]) -> None:
    """What was begun and not settled leaves prompts and groups where they were."""
    for rank in (rank for ranks in results.values() for rank in ranks):
        state = rank["ahead"]["under_way"]
        assert state["settled"] is None
        assert (state["next_group"], state["batches"]) == (BATCHES[1][-1] + 1, 2)
        assert state["stream"]["position"] == (BATCHES[1][-1] + 1) % len(RIGHT)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 2)])
def test_goes_on_with_the_batch_ahead(
    before: int, after: int, path: Path, results: dict[int, list[dict[str, Any]]]
) -> None:
    """A settled batch comes out of a checkpoint as it went in, on as many replicas or on others, and the next one is
    the one of a run that was not interrupted."""
    states = [rank["ahead"]["states"][0] for rank in results[before]]
    continued = run_ranks(_restored, after, path, after, states[0][0], [part for _, part in states])
    expected = [rank["ahead"]["batches"][1] for rank in results[after]]
    third = [rank["first"]["steps"][2] for rank in results[after]]
    for (second, next_one), reference in zip(continued, expected, strict=True):
        assert second.groups == reference.groups
        assert _steady(second.metrics) == pytest.approx(_steady(reference.metrics), rel=1e-6)
        assert next_one.groups == third[0].groups
    if before == after:
        assert [b[0].rollouts.ids.tolist() for b in continued] == [b.rollouts.ids.tolist() for b in expected]
    _assert_same([b[0].rollouts for b in continued], [b.rollouts for b in expected])


@pytest.mark.parametrize("world", [1, 2])
def test_continued_responses(world: int, results: dict[int, list[dict[str, Any]]]) -> None:
    """With rollout.partial the batches are the same groups and tokens; some responses have tokens of two versions, the
    older ones first, and no token is older than allowed."""
    several = 0
    for step in range(4):
        batches = [rank["partial"]["batches"][step] for rank in results[world]]
        assert all(batch.groups == BATCHES[step] for batch in batches)
        whole = _whole([batch.rollouts for batch in batches])
        for versions, prompt in zip(
            whole.weight_versions.split(whole.lengths.tolist()), whole.prompt_lengths, strict=True
        ):
            drawn_by = versions[prompt:].tolist()
            assert drawn_by == sorted(drawn_by)
            assert set(drawn_by) <= {step - 1, step}
            several += len(set(drawn_by)) > 1
        if step < 3:
            expected = [rank["first"]["steps"][step].rollouts for rank in results[world]]
            _assert_same([whole.replace(weight_versions=_whole(expected).weight_versions)], expected)
    assert several > 0


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1)])
def test_paused_responses_survive_a_checkpoint(
    before: int, after: int, path: Path, results: dict[int, list[dict[str, Any]]]
) -> None:
    """Tokens, log-probabilities and versions of what was paused are those that were saved; the batch made of them
    continues them."""
    ranks = results[before]
    parts = [rank["partial"]["kept"][0] for rank in ranks]
    saved = _whole([Rollouts(**part["rollouts"]) for part in parts])
    assert len(saved) > 0
    assert not all(flag for part in parts for flag in part["finished"])
    restored = run_ranks(_partial_restored, after, path, after, ranks[0]["partial"]["states"][0], parts)
    _assert_same([Rollouts(**rank["again"]["rollouts"]) for rank in restored], [saved])
    batch = _whole([rank["batch"].rollouts for rank in restored])
    assert restored[0]["batch"].groups == BATCHES[1]
    assert set(batch.weight_versions[batch.loss_mask].tolist()) == {0, 1}


@pytest.mark.parametrize("world", [1, 2])
def test_interrupted(world: int, results: dict[int, list[dict[str, Any]]]) -> None:
    """A request to stop on one rank ends the wait on all, cancels what is under way, and moves nothing."""
    for rank in results[world]:
        assert rank["interrupted"] == ["0", "0", "False"]


@pytest.mark.parametrize("world", [1, 2])
def test_goes_on_with_another_engine(world: int, results: dict[int, list[dict[str, Any]]]) -> None:
    """Rounds take up what a stream left, and the other way round: the groups behind the first batch."""
    for rank in results[world]:
        assert rank["changed"] == [7, 1, 7] * 2


def test_failure_in_the_background(results: dict[int, list[dict[str, Any]]]) -> None:
    """A reward function that raises ends collection on all ranks; the others say where it was."""
    assert results[1][0]["failing"] == ["ZeroDivisionError: no verdict"]
    first, second = (rank["failing"][0] for rank in results[2])
    assert first == "ZeroDivisionError: no verdict"
    assert second == "RuntimeError: rank 0 cannot go on drawing responses: ZeroDivisionError: no verdict"
