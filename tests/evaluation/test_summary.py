"""The figures of an evaluation by hand, and against loops over all samples."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_fipo.evaluation import Evaluation, summarize
from megatron_fipo.evaluation.summary import powers_of_two
from tests.support.samples import samples


def test_by_hand() -> None:
    """Two problems of three: 3 of 6 right, one majority right, both solved once; every first sample is cut off."""
    e = summarize(samples("rxr", "xxr"))
    assert (e.samples, e.problems, e.avg, e.cons, e.pass_, e.length) == (3, 2, 0.5, 0.5, 1.0, 20.0)
    assert e.truncated == pytest.approx(1 / 3)
    assert e.pass_at == {"pass@1": 0.5, "pass@2": pytest.approx((1 + 2 / 3) / 2), "pass@3": 1.0}
    quantiles = {"q10": 10.0, "q25": 12.5, "median": 20.0, "q75": 27.5, "q90": 30.0, "max": 30.0}
    means = {"correct": pytest.approx(70 / 3), "incorrect": pytest.approx(50 / 3)}
    assert e.lengths == {**quantiles, **means, "correct_median": 30.0, "incorrect_median": 20.0}
    assert e.intervals["pass@k"] == (1.0, 1.0)
    assert e.intervals["cons@k"] == (0.0, 1.0)
    assert e.intervals["avg@k"] == pytest.approx((1 / 3, 2 / 3))
    assert e.benchmarks == {}
    assert (e.cons_answered, e.answered) == (0.5, 1.0)


def test_responses_without_an_answer() -> None:
    """Three problems of four: their votes with and without the missing answers, and the share of answers."""
    e = summarize(samples("r...", "rx..", "rr.."))
    assert e.cons == pytest.approx((0 + 0 + 1 / 2) / 3)
    assert e.cons_answered == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert e.answered == pytest.approx(5 / 12)
    assert e.metrics()["eval/cons_answered@k"] == e.cons_answered
    assert e.metrics()["eval/answered"] == e.answered
    assert e.intervals["cons_answered@k"] == (0.5, 1.0)


def test_order_of_arrival_does_not_matter() -> None:
    """Samples come from all ranks interleaved."""
    some = [*samples("rxxr", "xrrx", "..rx", benchmark="b"), *samples("rrrx", benchmark="a")]
    assert summarize(some[::-1]) == summarize(some[::2] + some[1::2]) == summarize(some)


@given(st.integers(1, 6).flatmap(lambda k: st.lists(st.text("rxy.", min_size=k, max_size=k), min_size=1, max_size=5)))
def test_equals_the_loop(words: list[str]) -> None:
    """All three figures of any set of problems, their order, and that each lies in its interval."""
    result = summarize(samples(*words))
    assert result.avg == pytest.approx("".join(words).count("r") / len("".join(words)))
    assert result.cons == pytest.approx(sum(map(_chance, words)) / len(words))
    assert result.cons_answered == pytest.approx(sum(_chance(w.replace(".", "")) for w in words) / len(words))
    assert result.pass_ == pytest.approx(sum("r" in w for w in words) / len(words))
    assert result.pass_ + 1e-12 >= max(result.avg, result.cons)
    assert result.pass_at["pass@1"] == pytest.approx(result.avg)
    assert result.pass_at[f"pass@{result.samples}"] == pytest.approx(result.pass_)
    for name, value in {**result.scores(), **result.pass_at}.items():
        low, high = result.intervals[name]
        assert low - 1e-12 <= value <= high + 1e-12


def _chance(word: str) -> float:
    votes = Counter(word)
    winners = [a for a, n in votes.items() if n == max(votes.values())]
    return ("r" in winners) / max(len(winners), 1)


def test_several_benchmarks() -> None:
    """Scores are means over the benchmarks, however small one is; lengths are of all samples; each has its own."""
    small, large = samples("rr", benchmark="small"), samples("rx", "xx", "xx", benchmark="large")
    both = summarize([*small, *large])
    alone = {"large": summarize(large), "small": summarize(small)}
    assert both.avg == pytest.approx((1 + 1 / 6) / 2)
    assert both.cons == pytest.approx((1 + 1 / 6) / 2)
    assert both.pass_ == pytest.approx((1 + 1 / 3) / 2)
    assert (both.problems, both.length) == (4, 15.0)
    assert both.benchmarks == alone
    # The small one is 1 in every resample; the large one's mean is a third of the draws of its first problem.
    assert both.intervals["pass@k"] == pytest.approx((0.5, 1.0))


def test_selection_is_not_reported() -> None:
    """The benchmark that selects has its own scores; scores, intervals, lengths and counts of all leave it out."""
    first, second, select = samples("rr", benchmark="a"), samples("rx", benchmark="b"), samples("xx", benchmark="s")
    chosen = summarize([*first, *second, *select], selection="s")
    reported = summarize([*first, *second])
    assert chosen.benchmarks == {"a": summarize(first), "b": summarize(second), "s": summarize(select)}
    assert replace(chosen, benchmarks={}) == replace(reported, benchmarks={})
    assert (chosen.avg, chosen.problems) == (0.75, 2)
    alone = summarize([*first, *select], selection="s")
    assert replace(alone, benchmarks={}) == summarize(first)


@pytest.mark.parametrize(("words", "counts"), [(["rr", "r"], r"\[1, 2\]"), ([], r"\[\]")])
def test_unequal_counts_are_refused(words: list[str], counts: str) -> None:
    """A problem with fewer samples than another, or no sample at all."""
    with pytest.raises(ValueError, match=f"the same number of samples, got {counts}"):
        summarize(samples(*words))


def test_wanted_passes() -> None:
    """The reported k are those that were asked for; by default powers of two, and k itself."""
    assert list(summarize(samples("rxxx"), pass_k=(4, 3)).pass_at) == ["pass@3", "pass@4"]
    assert powers_of_two(1) == [1]
    assert powers_of_two(32) == [1, 2, 4, 8, 16, 32]
    assert powers_of_two(12) == [1, 2, 4, 8, 12]


def test_names_of_the_figures() -> None:
    """Metrics are named as in summary.json and metrics.jsonl; a single benchmark's name is not part of them."""
    result = summarize(samples("rx"), pass_k=())
    scores = {"avg@k": 0.5, "cons@k": 0.5, "cons_answered@k": 0.5, "pass@k": 1.0}
    assert result.scores() == scores
    assert result.metrics() == {
        **{f"eval/{name}": value for name, value in scores.items()},
        **{f"eval/{name}/{end}": value for name, value in scores.items() for end in ("low", "high")},
        "eval/answered": 1.0,
        "eval/length": 15.0,
        "eval/truncated": 0.5,
        **{f"eval/length/{name}": value for name, value in result.lengths.items()},
    }


def test_names_of_several_benchmarks() -> None:
    """Each one's figures under its name, beside those of all."""
    metrics = summarize([*samples("rr", benchmark="a"), *samples("xx", benchmark="b")]).metrics()
    assert (metrics["eval/a/avg@k"], metrics["eval/b/avg@k"], metrics["eval/avg@k"]) == (1.0, 0.0, 0.5)
    assert metrics["eval/a/length"] == 15.0
    assert "eval/a/length/incorrect" not in metrics


def test_failures_of_the_verifier_are_counted() -> None:
    """By their reasons, among all samples; metrics have those that there were."""
    drawn = samples("rrx", "rxx")
    drawn[2] = replace(drawn[2], failure="timeout")
    drawn[5] = replace(drawn[5], failure="timeout")
    result = summarize(drawn)
    assert result.verifier_failures == {"timeout": 2}
    assert result.metrics()["eval/verifier_timeouts"] == 2.0
    assert Evaluation.from_state_dict(asdict(result)) == result
    assert not any("verifier" in name for name in summarize(samples("rx")).metrics())
