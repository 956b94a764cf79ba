import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.data import Prompt, PromptSet, PromptStream


def prompt_set(n, truth="1"):
    return PromptSet(tuple(Prompt(i, [], [i], "test", truth) for i in range(n)), n, n, 0)


def indices(stream, n):
    return [prompt.index for prompt in stream.next(n)]


@given(size=st.integers(1, 20), takes=st.lists(st.integers(0, 30), max_size=8))
def test_every_prompt_once_an_epoch(size, takes):
    """However the stream is cut, each epoch holds every prompt once, and the cuts change nothing."""
    stream, whole = PromptStream(prompt_set(size), seed=3), PromptStream(prompt_set(size), seed=3)
    taken = [i for n in takes for i in indices(stream, n)]
    assert taken == indices(whole, sum(takes))
    assert stream.epoch == sum(takes) // size
    for start in range(0, len(taken) - size + 1, size):
        assert sorted(taken[start : start + size]) == list(range(size))


@given(size=st.integers(1, 20), before=st.integers(0, 60), after=st.integers(0, 60))
def test_resumes_exactly(size, before, after):
    """A stream restored from a state, by way of JSON, continues as the old one does."""
    old, new = PromptStream(prompt_set(size), seed=5), PromptStream(prompt_set(size), seed=5)
    old.next(before)
    new.load_state_dict(json.loads(json.dumps(old.state_dict())))
    assert indices(new, after) == indices(old, after)
    assert new.state_dict() == old.state_dict()


@pytest.mark.parametrize("epochs", [1, 2])
def test_resumes_at_an_epoch_s_end(epochs):
    """The last prompt of an epoch was handed out and none of the next: that one begins, in its own order."""
    old, new = PromptStream(prompt_set(7), seed=5), PromptStream(prompt_set(7), seed=5)
    before = indices(old, 7 * epochs)
    new.load_state_dict(json.loads(json.dumps(old.state_dict())))
    following = indices(new, 7)
    assert new.epoch == epochs + 1
    assert sorted(following) == list(range(7))
    assert following != before[-7:]
    assert following == indices(old, 7)


def test_going_back_within_a_run():
    """A state of an earlier epoch brings that epoch's order back."""
    stream = PromptStream(prompt_set(10), seed=0)
    stream.next(4)
    state = stream.state_dict()
    expected = indices(stream, 23)
    stream.load_state_dict(state)
    assert indices(stream, 23) == expected


def test_order_depends_on_seed_and_epoch():
    """Another seed or another epoch is another order; the same ones are the same order."""
    stream, same, other = (PromptStream(prompt_set(50), seed) for seed in (1, 1, 2))
    first, second = indices(stream, 50), indices(stream, 50)
    assert first != second
    assert indices(same, 50) == first
    assert indices(other, 50) != first
    assert first != list(range(50))


def test_order_is_pinned():
    """The order of a seed is part of what a resumed run relies on: it may not change between versions."""
    assert indices(PromptStream(prompt_set(10), seed=1), 10) == [6, 0, 7, 9, 4, 1, 8, 5, 2, 3]


def test_without_shuffling():
    """With shuffling off the order is the file's, epoch after epoch."""
    assert indices(PromptStream(prompt_set(3), seed=1, shuffle=False), 7) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (PromptStream(prompt_set(10), seed=2), "seed"),
        (PromptStream(prompt_set(10), seed=1, shuffle=False), "shuffle"),
        (PromptStream(prompt_set(10, truth="2"), seed=1), "dataset_fingerprint"),
        (PromptStream(prompt_set(11), seed=1), "dataset_fingerprint"),
    ],
)
def test_state_of_another_stream_is_refused(other, name):
    """A state from other data or another order is a ValueError that says what differs."""
    with pytest.raises(ValueError, match=f"its {name} was"):
        other.load_state_dict(PromptStream(prompt_set(10), seed=1).state_dict())
