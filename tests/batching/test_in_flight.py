"""Batches from a stream of responses: what is in them depends on prompts and seeds, not on who finishes first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.batch import Rollouts
from tests.batching.in_flight_runs import BATCHES, GROUP, PACES, TIMING, all_cases, partial_restored, restored
from tests.batching.scoring import RIGHT
from tests.support.policies import save_tokenizer
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def results(path: Path) -> dict[int, list[dict[str, Any]]]:
    """world size -> rank -> case -> what was collected."""
    return {world: run_ranks(all_cases, world, path, world) for world in (1, 2)}


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
    assert (metrics["sampling/all_correct"], metrics["sampling/all_incorrect"]) == (1, 2)
    lengths = [(7 * g + 5 * i) % 14 + 9 for g in range(7, 14) for i in range(GROUP)]
    lengths += [3]  # the wrong answer to problem 9 is 10, a digit longer
    assert metrics["generated/response_length/mean"] == pytest.approx(sum(lengths) / (7 * GROUP))
    assert metrics["generated/accuracy"] == pytest.approx(sum(RIGHT[g % 10] for g in range(7, 14)) / (7 * GROUP))


@pytest.mark.parametrize("world", [1, 2])
def test_useless_groups_are_cancelled_at_once(world: int, results: dict[int, list[dict[str, Any]]]) -> None:
    """Once the batch's last possible group is finished, those behind it are cancelled, while one before it is still
    being sampled; their tokens so far, and those of groups that are dropped, are counted. Replicas share servers."""

    def tokens(groups: Sequence[int]) -> int:
        return sum((7 * g + 5 * i) % 14 + 9 for g in groups for i in range(GROUP))

    for replica, rank in enumerate(results[world]):
        metrics = rank["early"]["batch"].metrics
        assert rank["early"]["batch"].groups == BATCHES[0]
        assert rank["early"]["shared"] == (replica, world)
        assert metrics["sampling/cancelled_groups"] == 5  # 7 to 11
        assert metrics["sampling/cancelled_tokens"] == 5 * GROUP * 3
        wasted, generated = 60 + tokens([0, 2, 5]), 60 + tokens(range(7))
        assert metrics["sampling/wasted_tokens"] == wasted
        assert metrics["sampling/wasted_share"] == pytest.approx(wasted / generated)
        assert metrics["sampling/cancelled_share"] == pytest.approx(60 / generated)


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
    """A batch that was begun and is not full leaves prompts and groups where they were."""
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
    continued = run_ranks(restored, after, path, after, states[0][0], [part for _, part in states])
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
    restored = run_ranks(partial_restored, after, path, after, ranks[0]["partial"]["states"][0], parts)
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


@pytest.mark.parametrize("world", [1, 2])
def test_surplus_opens_the_next_batch_of_another_source(world: int, results: dict[int, list[dict[str, Any]]]) -> None:
    """Groups that a round left over are trained on by a run that continues in flight; a batch that was given up in
    between leaves them as they were."""
    for rank in results[world]:
        assert rank["surplus"]["given_up"]
        first, second = rank["surplus"]["batches"]
        assert (first.groups, second.groups) == (BATCHES[0], BATCHES[1])
        generated = [batch.metrics["sampling/prompts_generated"] for batch in (first, second)]
        assert generated == [12, 2]
    whole = Rollouts.concatenate([rank["surplus"]["batches"][1].rollouts for rank in results[world]])
    expected = Rollouts.concatenate([rank["first"]["steps"][1].rollouts for rank in results[world]])
    whole, expected = (r.select(r.ids.argsort()) for r in (whole, expected))
    for name in ("ids", "tokens", "rewards", "advantages", "rollout_log_probs"):
        assert torch.equal(getattr(whole, name), getattr(expected, name)), name


def test_failure_in_the_background(results: dict[int, list[dict[str, Any]]]) -> None:
    """A reward function that raises ends collection on all ranks; the others say where it was."""
    assert results[1][0]["failing"] == ["ZeroDivisionError: no verdict"]
    first, second = (rank["failing"][0] for rank in results[2])
    assert first == "ZeroDivisionError: no verdict"
    assert second == "RuntimeError: rank 0 cannot go on sampling responses: ZeroDivisionError: no verdict"
