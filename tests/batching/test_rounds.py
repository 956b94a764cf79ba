"""Filling a training batch with a scripted engine: the same on one replica and on two."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from megatron_fipo.algorithm.dynamic_sampling import DynamicSamplingExhausted
from megatron_fipo.batch import Rollouts
from megatron_fipo.batching import BatchBuilder, StepBatch, make_batch_builder
from megatron_fipo.config import RewardConfig
from megatron_fipo.data import PromptStream
from megatron_fipo.parallel import topology as topologies
from megatron_fipo.reward import make_reward
from megatron_fipo.rollout import Request, Response, Sampling, derive_seed
from tests.batching.scoring import RIGHT, build, digit_prompts, scorer
from tests.support.policies import make_config, save_tokenizer
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.distributed

GROUP = 4
LIMIT = 16  # max_response_tokens
INFORMATIVE = [g for g in range(36) if 0 < RIGHT[g % len(RIGHT)] < GROUP]


class ScriptedEngine:
    """Answers the first RIGHT[problem] responses of a group rightly; later ones of a group are longer.

    Which response of which group a request is follows from its seed, as the run's seeds are known.
    """

    through_first_rank = False

    def __init__(self, tokenizer: Any) -> None:
        self.vocabulary = tokenizer.get_vocab()
        self.stop = tokenizer.eos_token_id
        self.numbers = {derive_seed(1, "rollout", i): i for i in range(1000)}
        self.requested: list[int] = []

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        raise AssertionError("collecting loads no weights")

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        return [self._answer(request, sampling) for request in requests]

    def _answer(self, request: Request, sampling: Sampling) -> Response:
        number = self.numbers[request.seed]
        self.requested.append(number)
        group, i = divmod(number, GROUP)
        problem = group % len(RIGHT)
        answer = problem if i < RIGHT[problem] else problem + 1
        text = "+" * (2 * i) + f"Answer:{answer}"  # 8 to 15 tokens
        truncated = (group, i) == (1, 3)  # one response goes on to the limit
        tokens = [self.vocabulary[c] for c in (text + "+" * (LIMIT - len(text)) if truncated else text)]
        tokens = tokens if truncated else [*tokens, self.stop]
        return Response(tokens, [-0.1 * (k + 1) for k in range(len(tokens))], truncated)


def _builder(path: Path, world: int, **rollout: Any) -> BatchBuilder:
    config = make_config(
        path,
        parallel={"world_size": world},
        rollout={"prompts_per_step": 4, "group_size": GROUP, "max_response_tokens": LIMIT, **rollout},
        reward={"overlong_buffer_tokens": 4},
    )
    topology = topologies.initialize(config.parallel, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(path)
    stream = PromptStream(digit_prompts(tokenizer), config.run.seed, shuffle=False)
    engine, reward = ScriptedEngine(tokenizer), make_reward(RewardConfig(function="exact"))
    stops = (tokenizer.eos_token_id,)
    return make_batch_builder(config, topology, engine, scorer(config, reward, tokenizer, stops), stream, stops)


def _collect(path: Path, world: int, steps: int, **rollout: Any) -> dict[str, Any]:
    """Return `steps` batches of this rank, or the error; and which responses this rank had to generate."""
    builder = _builder(path, world, **rollout)
    collected: list[StepBatch] = []
    error = None
    try:
        for _ in range(steps):
            collected.append(build(builder))
    except DynamicSamplingExhausted as exhausted:
        error = str(exhausted)
    finally:
        topologies.destroy()
    return {"steps": collected, "error": error, "requested": builder.source.engine.requested, "held": builder._rollouts}


KEEP: dict[str, Any] = {"surplus_groups": "keep", "prompts_per_round": 18}
CASES: dict[str, dict[str, Any]] = {
    "drop": {"steps": 3},
    "keep": {"steps": 3, **KEEP},
    "no_filter": {"steps": 2, "dynamic_sampling": False},
    "stop": {"steps": 1, "max_rounds": 1},
    "train": {"steps": 1, "max_rounds": 1, "when_exhausted": "train"},
}


def _all_cases(path: Path, world: int) -> dict[str, Any]:
    return {name: _collect(path, world, **case) for name, case in CASES.items()}


def _state_after_one_step(path: Path, world: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    builder = _builder(path, world, **KEEP)
    builder.build()
    state = builder.state_dict(), builder.kept_rollouts()
    builder.build()  # goes on, and must not change what was saved
    topologies.destroy()
    return state


def _two_steps_from(path: Path, world: int, state: dict[str, Any], parts: list[dict[str, torch.Tensor]]) -> Any:
    builder = _builder(path, world, **KEEP)
    builder.load_state_dict(json.loads(json.dumps(state)), parts)
    steps = [build(builder) for _ in range(2)]
    topologies.destroy()
    return steps


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """world size -> rank -> case -> what was collected."""
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return {world: run_ranks(_all_cases, world, path, world) for world in (1, 2)}


def _whole(ranks: list[dict[str, Any]], case: str, step: int) -> Rollouts:
    """The batch over all replicas, by id."""
    parts = Rollouts.concatenate([rank[case]["steps"][step].rollouts for rank in ranks])
    return parts.select(parts.ids.argsort())


@pytest.mark.parametrize("case", CASES)
def test_replicas_change_nothing(case: str, results: dict[int, list[dict[str, Any]]]) -> None:
    """Two replicas accept the groups, rewards, advantages and tokens that one does, and log the same metrics."""
    (one,) = results[1]
    for rank in results[2]:
        assert rank[case]["error"] == one[case]["error"]
        for step, expected in zip(rank[case]["steps"], one[case]["steps"], strict=True):
            assert step.groups == expected.groups
            assert step.metrics == pytest.approx(expected.metrics, rel=1e-6)
    for step in range(len(one[case]["steps"])):
        whole, expected = _whole(results[2], case, step), _whole([one], case, step)
        for name, values in vars(expected).items():
            assert torch.equal(getattr(whole, name), values), name


def test_replicas_share_the_work(results: dict[int, list[dict[str, Any]]]) -> None:
    """Every response is generated once, half of them by each of two replicas, and each keeps its own."""
    (one,) = results[1]
    mine, theirs = (rank["drop"]["requested"] for rank in results[2])
    assert sorted(mine + theirs) == sorted(one["drop"]["requested"]) == list(range(len(mine) + len(theirs)))
    assert len(mine) == len(theirs)
    for step in range(3):
        shares = [set(rank["drop"]["steps"][step].rollouts.ids.tolist()) for rank in results[2]]
        assert not shares[0] & shares[1]


def test_informative_groups_in_prompt_order(results: dict[int, list[dict[str, Any]]]) -> None:
    """Dynamic sampling takes the first informative groups of each step's rounds, and counts what it left out."""
    first, second, third = results[1][0]["drop"]["steps"]
    # Rounds of four: groups 0-3 hold 1 and 3, 4-7 hold 4 and 6; 8-11 hold 8, 9 and 11, 12-15 hold 13 and 14.
    assert first.groups == [1, 3, 4, 6]
    assert second.groups == [8, 9, 11, 13]
    assert third.groups == [16, 18, 19, 21]
    expected = {"rounds": 2, "prompts_generated": 8, "all_correct": 2, "all_incorrect": 2, "surplus_groups": 0}
    assert {k: first.metrics[f"sampling/{k}"] for k in expected} == expected
    assert second.metrics["sampling/surplus_groups"] == 1
    assert len(first.rollouts) == 4 * GROUP


def test_wasted_tokens(results: dict[int, list[dict[str, Any]]]) -> None:
    """Wasted is what was generated and is neither trained on nor kept for the next step: with surplus_groups=drop all
    but the batch, with keep only groups without a gradient; a step that generates nothing wastes nothing."""

    def generated(step: StepBatch) -> float:
        return step.metrics["generated/response_length/mean"] * step.metrics["sampling/prompts_generated"] * GROUP

    for step in results[1][0]["drop"]["steps"]:
        wasted = generated(step) - float(step.rollouts.response_lengths.sum())
        assert wasted > 0
        assert step.metrics["sampling/wasted_tokens"] == pytest.approx(wasted)
        assert step.metrics["sampling/wasted_share"] == pytest.approx(wasted / generated(step))
        assert "sampling/cancelled_share" not in step.metrics
    first, second, third = results[1][0]["keep"]["steps"]
    used = Rollouts.concatenate([first.rollouts, second.rollouts, third.rollouts.select(torch.arange(2 * GROUP))])
    wasted = generated(first) - float(used.response_lengths.sum())
    assert first.metrics["sampling/wasted_tokens"] == pytest.approx(wasted)
    assert (second.metrics["sampling/wasted_tokens"], second.metrics["sampling/wasted_share"]) == (0, 0)


def test_kept_surplus_opens_the_next_step(results: dict[int, list[dict[str, Any]]]) -> None:
    """surplus_groups=keep loses no informative group; a step that the surplus fills generates nothing."""
    steps = results[1][0]["keep"]["steps"]
    assert [g for step in steps for g in step.groups] == INFORMATIVE[:12]
    assert [step.metrics["sampling/rounds"] for step in steps] == [1, 0, 1]
    assert [step.metrics["sampling/surplus_groups"] for step in steps] == [6, 2, 9]
    assert "generated/reward" not in steps[1].metrics
    assert list(results[1][0]["keep"]["held"]) == INFORMATIVE[12:]


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_goes_on_from_its_state(
    before: int, after: int, results: dict[int, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """With kept surplus groups, on as many replicas or on others: the batches of an uninterrupted run, to the bit
    where the replicas are as many."""
    save_tokenizer(tmp_path)
    states = run_ranks(_state_after_one_step, before, tmp_path, before)
    assert len({json.dumps(state) for state, _ in states}) == 1
    parts = [part for _, part in states]
    assert sum(len(part["surplus"]["ids"]) for part in parts) == 6 * GROUP
    continued = run_ranks(_two_steps_from, after, tmp_path, after, states[0][0], parts)
    for step in range(2):
        for rank, reference in zip(continued, results[after], strict=True):
            expected = reference["keep"]["steps"][step + 1]
            assert rank[step].groups == expected.groups
            exact = before == after
            assert rank[step].metrics == (expected.metrics if exact else pytest.approx(expected.metrics, rel=1e-6))
        whole = Rollouts.concatenate([rank[step].rollouts for rank in continued])
        expected = _whole(results[after], "keep", step + 1)
        for name, values in vars(whole.select(whole.ids.argsort())).items():
            assert torch.equal(values, getattr(expected, name)), name


def test_without_dynamic_sampling_every_group_is_taken(results: dict[int, list[dict[str, Any]]]) -> None:
    """Groups that are all right or all wrong stay; only their lengths tell their responses apart."""
    first, second = results[1][0]["no_filter"]["steps"]
    assert (first.groups, second.groups) == ([0, 1, 2, 3], [4, 5, 6, 7])
    assert first.metrics["sampling/rounds"] == 1
    assert first.rollouts.accuracy[: 3 * GROUP].tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    penalty = torch.tensor([0.0, 0.0, -0.25, -0.75])
    for group in (0, 2):
        advantages = first.rollouts.advantages[group * GROUP : (group + 1) * GROUP]
        torch.testing.assert_close(advantages, (penalty - penalty.mean()) / (penalty.std() + 1e-6))


def test_exhausted(results: dict[int, list[dict[str, Any]]]) -> None:
    """After max_rounds the run stops with the arithmetic, or trains on what there is."""
    error = results[1][0]["stop"]["error"]
    assert "1 generation rounds of 4 prompts gave 2 of the 4 groups" in error
    assert "1 were all correct and 1 all incorrect" in error
    (batch,) = results[1][0]["train"]["steps"]
    assert batch.groups == [1, 3]
    assert batch.metrics["batch/responses"] == 2 * GROUP


def test_rewards_include_the_overlong_penalty(results: dict[int, list[dict[str, Any]]]) -> None:
    """+1 or -1, less a quarter for each token beyond 12 of 16; accuracy is not shaped; advantages are of the sum."""
    rollouts = _whole(results[1], "drop", 0)
    lengths = torch.tensor([9.0, 11.0, 13.0, 15.0])  # stop token included
    penalty = torch.tensor([0.0, 0.0, -0.25, -0.75])
    for place, group in enumerate([1, 3, 4, 6]):
        rows = slice(place * GROUP, (place + 1) * GROUP)
        right = (torch.arange(GROUP) < RIGHT[group]).float()
        cut = group == 1  # its last response runs into the limit
        expected = 2 * right - 1 + (torch.tensor([0.0, 0.0, -0.25, -1.0]) if cut else penalty)
        assert rollouts.response_lengths[rows].tolist() == ([9, 11, 13, 16] if cut else lengths.tolist())
        assert rollouts.truncated[rows].tolist() == [False, False, False, cut]
        assert torch.equal(rollouts.accuracy[rows], right)
        assert torch.equal(rollouts.rewards[rows], expected)
        advantages = (expected - expected.mean()) / (expected.std() + 1e-6)
        torch.testing.assert_close(rollouts.advantages[rows], advantages)


def test_stop_token_is_trained_on_and_the_prompt_is_not(
    results: dict[int, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Each sequence is the templated prompt, out of the loss, then the response with its stop token, in the loss."""
    tokenizer = save_tokenizer(tmp_path)
    rollouts = _whole(results[1], "drop", 0)
    lengths, prompts = rollouts.lengths.tolist(), rollouts.prompt_lengths.tolist()
    columns = [x.split(lengths) for x in (rollouts.tokens, rollouts.loss_mask, rollouts.rollout_log_probs)]
    for i, (tokens, mask, log_probs) in enumerate(zip(*columns, strict=True)):
        problem = int(rollouts.ids[i]) // GROUP % len(RIGHT)
        assert tokenizer.decode(tokens[: prompts[i]]) == f"<bos>{problem}?"
        assert mask.tolist() == [False] * prompts[i] + [True] * (lengths[i] - prompts[i])
        assert (tokens[-1] == tokenizer.eos_token_id) == (not rollouts.truncated[i])
        assert (log_probs[: prompts[i]] == 0).all()
        expected = [-0.1 * (k + 1) for k in range(lengths[i] - prompts[i])]
        assert log_probs[prompts[i] :].tolist() == pytest.approx(expected)


def test_metrics_of_all_generated_responses(results: dict[int, list[dict[str, Any]]]) -> None:
    """generated/ counts dropped groups too, batch/ only what is trained on."""
    metrics = results[1][0]["drop"]["steps"][0].metrics
    right = RIGHT[:8]
    assert metrics["generated/accuracy"] == pytest.approx(sum(right) / 32)
    penalties = 8 * (0.25 + 0.75) + 0.25  # one response is 16 tokens long instead of 15
    assert metrics["generated/reward"] == pytest.approx((2 * sum(right) - 32 - penalties) / 32)
    assert metrics["generated/response_length/mean"] == pytest.approx((8 * 48 + 1) / 32)
    assert (metrics["generated/response_length/min"], metrics["generated/response_length/max"]) == (9, 16)
    assert metrics["generated/truncated"] == pytest.approx(1 / 32)
    assert metrics["batch/responses"] == 16
    assert metrics["batch/response_length/mean"] == pytest.approx((4 * 48 + 1) / 16)
    lengths = sorted([9, 11, 13, 15] * 3 + [9, 11, 13, 16])
    quantiles = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1]).tolist()
    assert [metrics[f"batch/response_length/{q}"] for q in ("min", "q25", "median", "q75", "max")] == quantiles
    assert metrics["batch/accuracy"] == (2 + 1 + 3 + 2) / 16
    assert metrics["batch/truncated"] == 1 / 16
    assert metrics["batch/reward"] == pytest.approx((2 * (2 + 1 + 3 + 2) - 16 - 4 - 0.25) / 16)
