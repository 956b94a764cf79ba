"""Dynamic sampling: which groups stay, how rounds fill a batch, and what happens when they do not."""

import pytest
import torch

from megatron_fipo.algorithm import DynamicSampling, DynamicSamplingExhausted, informative_groups

RIGHT, WRONG, MIXED = [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]


def outcomes(*groups):
    accuracy = torch.tensor(groups, dtype=torch.float32).flatten()
    return informative_groups(accuracy, torch.arange(len(groups)).repeat_interleave(2))


def test_informative_groups():
    """Only a group with right and wrong responses is informative; groups may be interleaved."""
    accuracy = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    found = informative_groups(accuracy, torch.tensor([9, 4, 9, 4, 2, 2]))
    assert found.group.tolist() == [2, 4, 9]
    assert found.informative.tolist() == [True, False, False]
    assert found.all_incorrect.tolist() == [False, True, False]
    assert found.all_correct.tolist() == [False, False, True]


def test_rounds_until_full():
    """Rounds are asked for until the batch is full; groups stay in prompt order; everything is counted."""
    sampling = DynamicSampling[str](prompts_per_step=3, prompts_per_round=3)
    assert sampling.needs_more()
    sampling.add(["a", "b", "c"], outcomes(MIXED, RIGHT, WRONG))
    assert sampling.needs_more()
    sampling.add(["d", "e", "f"], outcomes(MIXED, MIXED, MIXED))
    assert not sampling.needs_more()
    batch = sampling.take()
    assert (batch.groups, batch.surplus) == (["a", "d", "e"], ["f"])
    assert (batch.rounds, batch.generated_prompts) == (2, 6)
    assert (batch.dropped_all_correct, batch.dropped_all_incorrect) == (1, 1)


def test_surplus():
    """Surplus groups can open the next batch, without a round; counts are the next batch's own."""
    sampling = DynamicSampling[str](prompts_per_step=1, prompts_per_round=3)
    sampling.add(["a", "b", "c"], outcomes(MIXED, MIXED, MIXED))
    first = sampling.take()
    assert (first.groups, first.surplus) == (["a"], ["b", "c"])
    sampling = DynamicSampling[str](prompts_per_step=1, prompts_per_round=3, pending=first.surplus)
    assert not sampling.needs_more()
    second = sampling.take()
    assert (second.groups, second.surplus, second.rounds, second.generated_prompts) == (["b"], ["c"], 0, 0)
    assert first.surplus == ["b", "c"]


def test_part_of_a_round_counts_as_one():
    """Groups that are added one by one make a round when the first of it is added."""
    sampling = DynamicSampling[str](prompts_per_step=2, prompts_per_round=3, max_rounds=2)
    rounds = []
    for name in "abcd":
        assert sampling.needs_more()
        sampling.add([name], outcomes(WRONG))
        rounds.append(sampling.rounds)
    assert rounds == [1, 1, 1, 2]


def test_exhausted():
    """After max_rounds the error gives the counts and says what to change."""
    sampling = DynamicSampling[str](prompts_per_step=2, prompts_per_round=2, max_rounds=2)
    for _ in range(2):
        assert sampling.needs_more()
        sampling.add(["a", "b"], outcomes(RIGHT, WRONG))
    with pytest.raises(
        DynamicSamplingExhausted, match=r"2 generation rounds of 4 prompts gave 0 of the 2 .*: 2 .* 2 .*max_rounds"
    ):
        sampling.needs_more()


def test_exhausted_trains_on_what_there_is():
    """With when_exhausted = train a short batch is taken, but never an empty one."""
    sampling = DynamicSampling[str](2, 2, max_rounds=1, when_exhausted="train")
    sampling.add(["a", "b"], outcomes(MIXED, WRONG))
    assert not sampling.needs_more()
    assert sampling.take().groups == ["a"]
    sampling = DynamicSampling[str](2, 1, max_rounds=1, when_exhausted="train")
    sampling.add(["c"], outcomes(WRONG))
    with pytest.raises(DynamicSamplingExhausted):
        sampling.needs_more()


def test_no_limit():
    """max_rounds = 0 never gives up."""
    sampling = DynamicSampling[str](prompts_per_step=1, prompts_per_round=1, max_rounds=0)
    for _ in range(50):
        sampling.add(["a"], outcomes(WRONG))
        assert sampling.needs_more()


def test_without_filter():
    """filter_groups = False keeps uninformative groups and drops none."""
    sampling = DynamicSampling[str](prompts_per_step=2, prompts_per_round=2, filter_groups=False)
    sampling.add(["a", "b"], outcomes(RIGHT, WRONG))
    assert not sampling.needs_more()
    batch = sampling.take()
    assert (batch.groups, batch.dropped_all_correct, batch.dropped_all_incorrect) == (["a", "b"], 0, 0)


def test_errors():
    """Illegal sizes, and groups without an outcome, are refused."""
    with pytest.raises(ValueError, match="prompts_per_step = 0"):
        DynamicSampling(0, 1)
    with pytest.raises(ValueError, match="2 groups must have as many outcomes, got 1"):
        DynamicSampling[str](1, 1).add(["a", "b"], outcomes(MIXED))


def test_grades_are_informative_where_they_differ():
    """Grades of 0.2, 0.9 and 0.5 teach something; equal ones, and ones that differ by rounding, do not."""
    scores = torch.tensor([0.2, 0.9, 0.5, 0.7, 0.7, 0.7, 0.1 + 0.2, 0.3, 0.3], dtype=torch.float64)
    right = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    found = informative_groups(scores, torch.arange(3).repeat_interleave(3), right)
    assert found.informative.tolist() == [True, False, False]
    assert found.all_correct.tolist() == [False, True, False]
    assert found.all_incorrect.tolist() == [False, False, True]


def test_grades_of_right_responses_that_differ_are_informative():
    """Responses that all count as right, or all as wrong, but have different grades have a gradient."""
    scores, right = torch.tensor([0.6, 0.9, 0.1, 0.3]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    found = informative_groups(scores, torch.tensor([0, 0, 1, 1]), right)
    assert found.informative.tolist() == [True, True]
    assert not (found.all_correct | found.all_incorrect).any()


def test_accuracies_that_differ_at_equal_rewards_teach_nothing():
    """Advantages come from rewards: a group of equal rewards has none, whatever its accuracies."""
    found = informative_groups(torch.tensor([0.25, 0.25]), torch.tensor([0, 0]), torch.tensor([1.0, 0.0]))
    assert (found.informative.item(), found.all_correct.item(), found.all_incorrect.item()) == (False, False, True)


def test_accepted_groups_stay_when_rounds_are_exhausted():
    """With when_exhausted = train the groups of all rounds are there, in prompt order, and the counts of all rounds."""
    sampling = DynamicSampling[str](prompts_per_step=4, prompts_per_round=2, max_rounds=3, when_exhausted="train")
    for name in "abc":
        assert sampling.needs_more()
        sampling.add([name, name.upper()], outcomes(MIXED, WRONG))
    assert not sampling.needs_more()
    batch = sampling.take()
    assert batch.groups == ["a", "b", "c"]
    assert (batch.rounds, batch.generated_prompts, batch.dropped_all_incorrect) == (3, 6, 3)
