import random
import re
import time

import pytest

from megatron_fipo.config import RewardConfig
from megatron_fipo.reward import Score, make_reward
from megatron_fipo.reward.dapo import extract_answer, normalize, score


@pytest.mark.parametrize(
    ("answer", "normalized"),
    [
        ("34", "34"),
        ("$34$", "34"),
        (r"\$34", "34"),
        ("$34.$", "34"),
        ("x = 34", "34"),
        (r"\boxed{34}", "34"),
        (r"$\boxed{34}$", "34"),
        ("1,234,567", "1234567"),
        ("1{,}234", "1234"),
        (r"1,\!234", "1234"),
        ("12 cm", "12"),
        (r"12\text{ cm}", "12"),
        (r"12 \mbox{ inches}", "12"),
        (r"3\text{m}", "3"),
        ("10 square meters", "10"),
        (r"90^\circ", "90"),
        (r"90^{\circ}", "90"),
        (r"5^\mathrm{th}", "5^"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\sqrt2", r"\sqrt{2}"),
        (r"\text{an even number}", "evennumber"),
        (r"\overline{AB}", "AB"),
        (r"\textbf{7}", "7"),
        (r"x \text{and} y", "x,y"),
        ("2,3", "23"),  # as DAPO reads it: its answers are integers, so a comma separates thousands
        (r"the answer is $5$ metres", "5"),
        ("(1, 2)", "(1,2)"),
        ("a,b", "a,b"),
    ],
)
def test_normalize(answer, normalized):
    """Units, wrappers, dollar signs, commas and LaTeX shorthand come out as DAPO's normalization spells them."""
    assert normalize(answer) == normalized


@pytest.mark.parametrize("answer", ["34", r"\frac12", "1,234", r"\text{even}", "12 cm", r"\sqrt2"])
def test_normalize_is_idempotent(answer):
    """A normalized answer is already normal, so prepared ground truths compare equal."""
    assert normalize(normalize(answer)) == normalize(answer)


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("44+49=93;Answer:93", "93"),
        ("Answer: 1\nno,\nAnswer: 2", "2"),
        ("answer : 3\nand more", "3"),
        ("The answer is 3", None),
        ("Answer:", None),
        ("", None),
        ("Answer: 7" + " " * 291, "7" + " " * 291),
        ("Answer: 7" + "x" * 300, None),
    ],
)
def test_last_answer_of_the_final_300_characters(response, answer):
    """The last `Answer:` counts, to the end of its line, and only within the final 300 characters."""
    assert extract_answer(response) == answer


def test_scores_are_plus_and_minus_one():
    """A right answer is +1 and accuracy 1, a wrong or missing one -1 and accuracy 0."""
    assert score("so Answer: $1,234$", "1234") == Score(1.0, 1.0, "1234")
    assert score("so Answer: 1235", "1234") == Score(-1.0, 0.0, "1235")
    assert score("so 1234", "1234") == Score(-1.0, 0.0, None)


def test_ground_truth_is_normalized_too():
    """A ground truth written with units or LaTeX shorthand is compared in the same spelling."""
    assert score(r"Answer: \frac{1}{2}", r"$\frac12$").accuracy == 1.0


def test_textual_not_mathematical():
    """`dapo` compares strings: 0.5 is not 1/2."""
    assert score("Answer: 0.5", "1/2").accuracy == 0.0


def test_batch_keeps_the_order():
    """One score a response, in the responses' order."""
    scores = make_reward(RewardConfig())(["Answer: 1", "Answer: 2"], ["1", "1"], ["a", "b"])
    assert [s.reward for s in scores] == [1.0, -1.0]


def test_lengths_must_agree():
    """A ground truth short of a response is an error, not a truncation."""
    with pytest.raises(ValueError, match="shorter"):
        make_reward(RewardConfig())(["Answer: 1", "Answer: 2"], ["1"], ["a"])


REFERENCE = (
    (re.compile(r"^.*?\$(.*?)\$.*$"), r"\1"),
    (re.compile(r"\\(?:text|textbf|overline)\{(.*?)\}"), r"\1"),
    (re.compile(r"\\boxed\{(.*)\}"), r"\1"),
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),
)


def test_normalization_is_that_of_the_patterns():
    """20,000 random texts of dollar signs, wrappers, braces and line ends are rewritten as by regular expressions."""
    generator = random.Random(0)
    pieces = ("$", "\n", r"\text{", r"\textbf{", r"\overline{", r"\boxed{", "}", "{", "1", "b", r"\frac", r"\sqrt")
    for _ in range(20_000):
        text = "".join(generator.choices(pieces, k=generator.randint(0, 12)))
        expected = text
        for removed in ("\\text{\n}", r"\text{}"):
            expected = expected.replace(removed, "")
        for pattern, replacement in REFERENCE:
            expected = pattern.sub(replacement, expected)
        assert normalize(text) == expected.replace("$", "").strip(), text


@pytest.mark.parametrize("piece", ["$", "$\n", r"\text{", r"\boxed{", r"\frac", "}", r"\boxed{}", r"\text{a}"])
def test_normalization_is_linear(piece):
    """200,000 characters of what its patterns look for take less than 2 s; cubic time would be years."""
    text = piece * (200_000 // len(piece)) + "\n\n"
    started = time.process_time()
    normalize(text)
    assert time.process_time() - started < 2.0
