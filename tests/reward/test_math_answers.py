# ruff: noqa: RUF001 -- the look-alike characters are what is tested
"""Reading an answer: markup around it, unfinished answers, numbers side by side, failures and time-outs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_fipo.config import RewardConfig
from megatron_fipo.reward import RewardFunction, make_reward
from megatron_fipo.reward.extraction import extract_answer
from megatron_fipo.reward.math_notation import to_latex


@pytest.fixture(scope="module")
def reward() -> Iterator[RewardFunction]:
    made = make_reward(RewardConfig(function="math", workers=2, timeout_seconds=60.0))
    yield made
    made.close()


FINISHED = (
    ("\\boxed{6\nAnswer: 5", "5"),
    ("\\boxed{6 no, \\boxed{5}", "5"),
    ("\\boxed{5} \\] \\boxed{5}", "5"),
    ("**Answer**: 73", "73"),
    ("**Final Answer**: $73$", "73"),
    ("**Final Answer:** $73$", "73"),
    ("### Answer: 73", "73"),
    ("__Answer__: 73", "73"),
    ("<b>Answer</b>: 73", "73"),
    ("\\textbf{Answer}: 73", "73"),
    ("\\textbf{Answer:} 73", "73"),
    ("Answer：73", "73"),
    ("**Answer** : **73**", "73"),
    ("*Answer*: *73*", "73"),
    ("Answer: _73_", "73"),
    ("**Final Answer**\n\n**Answer**:\n\n$$\n73\n$$\n", "73"),
    ("Answer: \\[ 73 \\]", "73"),
    ("Answer: \\(73\\).", "73"),
    ("Answer: <b>73</b>", "73"),
    ("## Final Answer:\n73", "73"),
    ("Answer: `73`", "73"),
    ("Answer: $\\frac{1}{2}$.", "\\frac{1}{2}"),
    ("Answer: 73\n", "73"),
    ("Answer: [1, 2)", "[1, 2)"),
    ("Answer: (-\\infty, 3]", "(-\\infty, 3]"),
    ("Answer: 2\\pi", "2\\pi"),
    ("Answer: \\frac{1}{2}\n", "\\frac{1}{2}"),
    ("Answer: \\{1,2\\}", "\\{1,2\\}"),
    ("Answer: x_1", "x_1"),
    ("Answer: 90^\\circ", "90^\\circ"),
    ("Answer: \\alpha", "\\alpha"),
    ("Answer: $x$ and $y$", "x$ and $y"),
    ("Answer: \\$5", "\\$5"),
    ("Answer: 50\\%", "50\\%"),
    ("Answer: {5}", "{5}"),
    ("$\\text{Answer: }73$", "73"),
    ("Answer: 5}", "5}"),
    ("My answer: \\boxed{5}", "5"),
    ("\\[\\boxed{5}\\]", "5"),
    ("Answer: $$5$$", "5"),
)
UNFINISHED = (
    "First \\boxed{5}. Wait, so \\boxed{6",
    "\\boxed{5} and \\box",
    "\\boxed{5} so \\boxed",
    "\\boxed{5}. \\boxed{\\frac{1}{2",
    "Answer: 5\\nwait \\boxed{6",
    "\\boxed{5}\nAnswer: \\frac{1}{",
    "\\boxed{5}\nAnswer: $6",
    "\\boxed{5}\nAnswer:",
    "\\boxed{5}\n**Answer**: ",
    "\\boxed{5}\nAnswer: \\(6",
    "\\boxed{5}\nAnswer: (1, 2",
    "answer: $5 dollars",
    "Answer: -\\frac",
    "Answer: 12\\",
    "Answer: $5",
)


@pytest.mark.parametrize(("response", "answer"), FINISHED)
def test_markup_around_the_answer(response: str, answer: str) -> None:
    """Bold, headings, HTML, TeX and line breaks around `Answer:` and around its value are no part of the answer."""
    assert extract_answer(response) == answer


@pytest.mark.parametrize("response", UNFINISHED)
def test_the_last_answer_must_be_finished(response: str) -> None:
    """A response that ends within its last answer has none, although it gave another one before."""
    assert extract_answer(response) is None


def test_dapo_reads_markup_as_its_authors_do() -> None:
    """`dapo` wants `Answer:` itself: markup between the word and the colon is no answer for it."""
    dapo = make_reward(RewardConfig(function="dapo"))
    assert [s.accuracy for s in dapo(["**Answer**: 73", "Answer: 73"], ["73", "73"], ["", ""])] == [0.0, 1.0]


def test_numbers_side_by_side_are_refused() -> None:
    """`3 5` is neither 35 nor 8 nor 15."""
    with pytest.raises(ValueError, match="adjacent numbers: '3 5'"):
        to_latex("3 5")


def test_failures_are_told_from_wrong_answers(reward: RewardFunction) -> None:
    """A ground truth that cannot be read is the verifier's failure, an answer that cannot be is a wrong answer."""
    responses = [r"\boxed{7}", r"\boxed{\frac{1}{}", r"\boxed{8}", "none"]
    scores = reward(responses, [r"\frac{1}{", "7", "7", "7"], [""] * 4)
    assert [s.failure for s in scores] == ["error", None, None, None]
    assert [s.reward for s in scores] == [-1.0] * 4


@pytest.mark.slow
def test_time_outs_are_told_from_wrong_answers() -> None:
    """An answer that takes for ever is counted as one, not as wrong mathematics."""
    reward = make_reward(RewardConfig(function="math", workers=1, timeout_seconds=4.0))
    try:
        scores = reward([r"\boxed{\sum_{k=1}^{10^{9}} \frac{1}{k^k}}", r"\boxed{8}"], ["7", "7"], ["", ""])
    finally:
        reward.close()
    assert [(s.accuracy, s.failure) for s in scores] == [(0.0, "timeout"), (0.0, None)]


SEPARATORS = (
    *("\n", "\n\n", "\\\n", " ", "\\ ", r"\,", r"\:", r"\;", r"\quad ", r"\qquad ", "~", "\t", "\u00a0", "\u2003"),
    *("$", "$ $", '"', "'", "`", ";", r"\\", "&", r"\mbox{ }", r"\text{ }", r"\hspace{1em}", r"\displaystyle "),
)
FORMS = ("7%s5", "{7}%s{5}", "7%s{5}", "{7}%s5", r"\mathrm{7}%s5", r"\mathbf{7}%s\mathbf{5}")


@pytest.mark.parametrize("form", FORMS)
def test_integers_side_by_side_are_no_integer(reward: RewardFunction, form: str) -> None:
    """However they are kept apart, 7 and 5 are neither their sum nor their product, quotient, difference or digits."""
    answers = [form % separator for separator in SEPARATORS]
    truths = ["12", "35", "75", "2", "1.4", "7", "5"]
    pairs = [(answer, truth) for answer in answers for truth in truths]
    scores = reward([rf"\boxed{{{a}}}" for a, _ in pairs], [t for _, t in pairs], ["test"] * len(pairs))
    assert [pair for pair, score in zip(pairs, scores, strict=True) if score.accuracy] == []


def test_mixed_numbers_stay_numbers(reward: RewardFunction) -> None:
    """An integer before a fraction is added to it; one after parentheses is a factor."""
    right = [(r"3\frac{1}{2}", "3.5"), ("3 1/2", "3.5"), ("(7)5", "35"), (r"7\cdot 5", "35"), (r"\frac{7}{5}", "1.4")]
    scores = reward([rf"\boxed{{{a}}}" for a, _ in right], [t for _, t in right], ["test"] * len(right))
    assert [score.accuracy for score in scores] == [1.0] * len(right)
