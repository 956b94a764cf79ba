"""Answers of a model: found in linear time, judged within their limits, never right by accident."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_fipo.config import RewardConfig
from megatron_fipo.reward import RewardFunction, dapo, exact, make_reward
from megatron_fipo.reward.extraction import extract_answer, unwrapped

pytestmark = pytest.mark.slow  # two minutes for all targets

CHARACTERS = 100_000
UNITS = (
    *(".", " ", "\n", "$", "{", "}", "(", ")", "*", "_", "`", "~", "#", ":", "=", ",", "and ", "or ", "\\", "a", "7"),
    *(
        r"\boxed{",
        r"\fbox{",
        r"\boxed{1}",
        r"\boxed ",
        r"\bo",
        r"\text{",
        r"\text{}",
        r"\overline{",
        r"\frac",
        r"\sqrt",
    ),
    *(
        "Answer:",
        "answer ",
        "**",
        "</b>",
        "<b>",
        "<",
        r"\]",
        r"\)",
        r"\[",
        r"\(",
        r"\$",
        r"\{",
        "\\\\",
        "\u3000",
        "\uff1a",
    ),
)
FUNCTIONS: tuple[Callable[[str], object], ...] = (
    extract_answer,
    unwrapped,
    dapo.normalize,
    dapo.extract_answer,
    lambda text: dapo.score(text, text),
    lambda text: exact.score(text, text),
)
units = st.lists(st.sampled_from(UNITS), min_size=1, max_size=3).map("".join)
ends = st.lists(st.sampled_from(UNITS), max_size=3).map("".join)


@settings(max_examples=60)
@given(ends, units, ends, units)
@example(r"\boxed{a", ".", "b}", " ")
@example(r"\boxed{1}", " ", r"\boxed{2}", "x")
@example("", "$", "\n\n", "\n")
@example("", r"\text{", "", r"\boxed{")
def test_linear_time(start: str, unit: str, end: str, other: str) -> None:
    """100,000 characters of one or two repeated units take less than 3 s of this process; quadratic time is minutes."""
    half = CHARACTERS // 2
    text = start + unit * (half // len(unit)) + other * (half // len(other)) + end
    for function in FUNCTIONS:
        started = time.process_time()
        function(text)
        assert time.process_time() - started < 3.0


@pytest.fixture(scope="module")
def reward() -> Iterator[RewardFunction]:
    made = make_reward(RewardConfig(function="math", workers=2, timeout_seconds=3.0, batch_seconds=8.0))
    yield made
    made.close()


atoms = st.sampled_from(
    ["1", "2", "10", "x", "y", r"\pi", "0", "99999999999", "\ud800", "é", r"\infty", ".5", "i", "%"]
)
expressions = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.builds("{}^{{{}}}".format, inner, inner),
        st.builds(r"\frac{{{}}}{{{}}}".format, inner, inner),
        st.builds(r"\sqrt{{{}}}".format, inner),
        st.builds("({}+{})!".format, inner, inner),
        st.builds(r"\sum_{{k=1}}^{{{}}}{}".format, inner, inner),
        st.builds(r"\begin{{pmatrix}}{}&{}\end{{pmatrix}}".format, inner, inner),
        st.builds(r"\{{{},{}\}}".format, inner, inner),
        st.builds("{}={}".format, inner, inner),
        st.builds("{}{}".format, inner, inner),
        st.builds(r"\left[{},{}\right)".format, inner, inner),
    ),
    max_leaves=8,
)


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(expressions, min_size=10, max_size=10))
@example(["10^{10^{10^{10}}}", "9^{9^{9^9}}!", "(10^{99})!"] * 4)
def test_limits_hold(reward: RewardFunction, answers: list[str]) -> None:
    """Every response has its score, an undecided one says why, and the next answer is judged."""
    scores = reward([rf"\boxed{{{a}}}" for a in answers], ["123456789.5"] * len(answers), [""] * len(answers))
    assert [s.reward for s in scores] == [-1.0] * len(answers)
    assert {s.failure for s in scores} <= {None, "timeout", "error"}
    (score,) = reward([r"\boxed{\frac{1}{2}}"], ["0.5"], [""])
    assert (score.accuracy, score.failure) == (1.0, None)


SEPARATORS = (
    *(" ", "\n", "\n\n", "\\\n", "\\ ", r"\,", r"\:", r"\;", r"\quad ", "~", "\t", "\u00a0", "$", "$ $", '"', "'", "`"),
    *(
        "; ",
        ", ",
        r"\\",
        "&",
        r"\text{ }",
        r"\mbox{ }",
        r"\hspace{1em}",
        r"\displaystyle ",
        "|",
        " and ",
        r"\text{ and }",
    ),
)
FORMS = ("{}{}{}", "{{{}}}{}{{{}}}", "{}{}{{{}}}", "{{{}}}{}{}", r"\mathrm{{{}}}{}\mathbf{{{}}}", r"\{{{}{}{}\}}")
pairs = st.tuples(
    st.integers(2, 99), st.sampled_from(SEPARATORS), st.integers(2, 99), st.sampled_from(FORMS), st.integers(0, 4)
)


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(pairs, min_size=100, max_size=100, unique=True))
def test_two_integers_are_no_third(reward: RewardFunction, given_pairs: list[tuple[int, str, int, str, int]]) -> None:
    """Two numbers beside each other, or in a list, are not equal to an integer that one could make of them."""
    asked = []
    for first, separator, second, form, operation in given_pairs:
        integers = (first + second, first * second, first - second, int(f"{first}{second}"), first**2)
        if first != second or form[0:2] != r"\{":  # a set of one element twice is that of one
            asked.append((form.format(first, separator, second), str(integers[operation])))
    scores = reward([rf"\boxed{{{a}}}" for a, _ in asked], [t for _, t in asked], [""] * len(asked))
    assert [pair for pair, score in zip(asked, scores, strict=True) if score.accuracy] == []
