"""Dynamic sampling: which groups stay, how rounds fill a batch, and what happens when they do not."""

import pytest
import torch

from megatron_fipo.algorithm import DynamicSamplingExhausted, GroupCollector, informative_groups

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
    collector = GroupCollector[str](prompts_per_step=3)
    assert collector.needs_round()
    collector.add_round(["a", "b", "c"], outcomes(MIXED, RIGHT, WRONG))
    assert collector.needs_round()
    collector.add_round(["d", "e", "f"], outcomes(MIXED, MIXED, MIXED))
    assert not collector.needs_round()
    batch = collector.take()
    assert batch.groups == ["a", "d", "e"]
    assert (batch.rounds, batch.generated_prompts, batch.surplus) == (2, 6, 1)
    assert (batch.dropped_all_correct, batch.dropped_all_incorrect) == (1, 1)


@pytest.mark.parametrize(("surplus_groups", "next_groups"), [("drop", []), ("keep", ["b", "c"])])
def test_surplus(surplus_groups, next_groups):
    """Surplus groups are cut, or open the next batch without a round; counts start over."""
    collector = GroupCollector[str](prompts_per_step=1, surplus_groups=surplus_groups)
    collector.add_round(["a", "b", "c"], outcomes(MIXED, MIXED, MIXED))
    assert collector.take().groups == ["a"]
    assert collector.pending == next_groups
    assert collector.needs_round() == (surplus_groups == "drop")
    assert collector.rounds == collector.generated_prompts == 0


def test_exhausted():
    """After max_rounds the error gives the counts and says what to change."""
    collector = GroupCollector[str](prompts_per_step=2, max_rounds=2)
    for _ in range(2):
        assert collector.needs_round()
        collector.add_round(["a", "b"], outcomes(RIGHT, WRONG))
    with pytest.raises(
        DynamicSamplingExhausted, match=r"2 generation rounds of 4 prompts gave 0 of the 2 .*: 2 .* 2 .*max_rounds"
    ):
        collector.needs_round()


def test_exhausted_trains_on_what_there_is():
    """With when_exhausted = train a short batch is taken, but never an empty one."""
    collector = GroupCollector[str](prompts_per_step=2, max_rounds=1, when_exhausted="train")
    collector.add_round(["a", "b"], outcomes(MIXED, WRONG))
    assert not collector.needs_round()
    assert collector.take().groups == ["a"]
    collector.add_round(["c"], outcomes(WRONG))
    with pytest.raises(DynamicSamplingExhausted):
        collector.needs_round()


def test_no_limit():
    """max_rounds = 0 never gives up."""
    collector = GroupCollector[str](prompts_per_step=1, max_rounds=0)
    for _ in range(50):
        collector.add_round(["a"], outcomes(WRONG))
        assert collector.needs_round()


def test_without_filter():
    """filter_groups = False keeps uninformative groups and drops none."""
    collector = GroupCollector[str](prompts_per_step=2, filter_groups=False)
    collector.add_round(["a", "b"], outcomes(RIGHT, WRONG))
    assert not collector.needs_round()
    batch = collector.take()
    assert (batch.groups, batch.dropped_all_correct, batch.dropped_all_incorrect) == (["a", "b"], 0, 0)


def test_errors():
    """Illegal sizes, and groups without an outcome, are refused."""
    with pytest.raises(ValueError, match="prompts_per_step = 0"):
        GroupCollector(0)
    with pytest.raises(ValueError, match="2 groups must have as many outcomes, got 1"):
        GroupCollector[str](1).add_round(["a", "b"], outcomes(MIXED))


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
    collector = GroupCollector[str](prompts_per_step=4, max_rounds=3, when_exhausted="train")
    for name in "abc":
        assert collector.needs_round()
        collector.add_round([name, name.upper()], outcomes(MIXED, WRONG))
    assert not collector.needs_round()
    batch = collector.take()
    assert batch.groups == ["a", "b", "c"]
    assert (batch.rounds, batch.generated_prompts, batch.dropped_all_incorrect) == (3, 6, 3)
