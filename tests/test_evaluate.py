"""Avg@k, Cons@k and Pass@k: by hand, and against loops over all votes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.evaluate import Evaluation, Sample, summarize


def _samples(*problems: str, truth: str = "r") -> list[Sample]:
    """Each problem a word whose letters are its answers in order; `.` is no answer, `r` the right one."""
    return [
        Sample(p, k, float(a == truth), None if a == "." else a, 10 * (k + 1), k == 0)
        for p, word in enumerate(problems)
        for k, a in enumerate(word)
    ]


def test_by_hand() -> None:
    """Two problems of three: 3 of 6 right, one majority right, both solved once; every first sample is cut off."""
    assert summarize(_samples("rxr", "xxr")) == Evaluation(
        samples=3, problems=2, avg=0.5, cons=0.5, pass_=1.0, length=20.0, truncated=1 / 3
    )


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        ("rrx", True),
        ("rxx", False),
        ("rx", True),  # a tie goes to the answer that came first
        ("xr", False),
        ("xrrx", False),
        ("abrr", True),  # a plurality is enough
        ("...r", True),  # no answer is no vote
        ("..xr", False),
        ("...", False),  # nobody voted
        ("xxx", False),
    ],
)
def test_majority(answers: str, right: bool) -> None:
    """Cons@k of one problem."""
    assert summarize(_samples(answers)).cons == float(right)


def test_order_of_arrival_does_not_matter() -> None:
    """Samples come from all ranks interleaved; ties are still decided by the sample's number."""
    samples = _samples("rxxr", "xrrx", "..rx")
    assert summarize(samples[::-1]) == summarize(samples[::2] + samples[1::2]) == summarize(samples)


def _right_by_votes(word: str) -> bool:
    votes = [a for a in word if a != "."]
    best = max((votes.count(a) for a in votes), default=0)
    winners = [a for a in votes if votes.count(a) == best]
    return bool(winners) and winners[0] == "r"


@given(st.integers(1, 6).flatmap(lambda k: st.lists(st.text("rxy.", min_size=k, max_size=k), min_size=1, max_size=5)))
def test_equals_the_loop(words: list[str]) -> None:
    """All three figures of any set of problems, and their order: Pass@k is the largest."""
    result = summarize(_samples(*words))
    assert result.avg == pytest.approx("".join(words).count("r") / len("".join(words)))
    assert result.cons == pytest.approx(sum(map(_right_by_votes, words)) / len(words))
    assert result.pass_ == pytest.approx(sum("r" in w for w in words) / len(words))
    assert result.pass_ >= max(result.avg, result.cons)
    assert (result.problems, result.samples) == (len(words), len(words[0]))


@pytest.mark.parametrize(("words", "counts"), [(["rr", "r"], r"\[1, 2\]"), ([], r"\[\]")])
def test_unequal_counts_are_refused(words: list[str], counts: str) -> None:
    """A problem with fewer samples than another, or no sample at all."""
    with pytest.raises(ValueError, match=f"the same number of samples, but there are {counts}"):
        summarize(_samples(*words))


def test_names_of_the_figures() -> None:
    """What summary.json and metrics.jsonl call them."""
    result = summarize(_samples("rx"))
    scores: dict[str, Any] = {"avg@k": 0.5, "cons@k": 1.0, "pass@k": 1.0}
    assert result.scores() == scores
    assert result.metrics() == {
        **{f"eval/{k}": v for k, v in scores.items()},
        "eval/length": 15.0,
        "eval/truncated": 0.5,
    }
