"""The recipe's verifier: the last `Answer: X` of the final 300 characters, normalized and compared as a string.

The normalization matches DAPO's, which is Minerva's (Lewkowycz et al. 2022, arXiv 2206.14858, appendix): it removes
unit words, LaTeX wrappers and typography, and adds braces to shorthand fractions and roots. It is purely textual:
`1/2` and `0.5` differ; the `math` verifier treats them as equal.
"""

from __future__ import annotations

import re

from megatron_fipo.reward.score import Score, binary_score

SEARCHED_CHARACTERS = 300

ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)

_ARTICLES = ("an ", "a ")
_AND = (r",\text{and}", r"\text{and}")

# Removed everywhere, in this order: `12cm`, `12 square meters` and `\text{12 points}` are all 12, and a
# `\text{}` emptied by removing a unit is removed next. Longer forms precede the forms they contain.
_REMOVED = (
    *("square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", r"\ldots", "sue", "points"),
    *("feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students"),
    *("childrentickets", "multiples", r"\text{s}", r"\text{.}", "\\text{\ns}", r"\text{}^2", r"\text{}^3"),
    *("\\text{\n}", r"\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}", r"\;", r",\!", "{,}", '"', r"\dots"),
)

_STYLE = re.compile(r"\\(?:text|textbf|overline)\{")
_BOX = r"\boxed{"
_SHORTHANDS = (
    (re.compile(r"frac([^{])(.)"), r"frac{\1}{\2}"),  # \frac12 -> \frac{1}{2}
    (re.compile(r"sqrt([^{])"), r"sqrt{\1}"),
)


def extract_answer(response: str) -> str | None:
    """Return the text after the last `Answer:` in the final 300 characters, up to the end of its line, or None."""
    found = ANSWER.findall(response[-SEARCHED_CHARACTERS:])
    return found[-1] if found else None


def normalize(answer: str) -> str:
    """Return a common spelling for answers that differ only in units, wrappers and typography."""
    answer = answer.rsplit("=", 1)[-1]
    for article in _ARTICLES:
        answer = answer.replace(article, "")
    answer = answer.replace(".$", "$").replace(r"\$", "").replace("\\ ", "").replace(" ", "").replace("mbox", "text")
    for conjunction in _AND:
        answer = answer.replace(conjunction, ",")
    answer = answer.replace(r"\text{m}", r"\text{}")
    for expression in _REMOVED:
        answer = answer.replace(expression, "")
    answer = _between_dollar_signs(answer)
    answer = "\n".join(_without_box(_without_styles(line)) for line in answer.split("\n"))
    for pattern, replacement in _SHORTHANDS:
        answer = pattern.sub(replacement, answer)
    answer = answer.replace("$", "")
    digits = answer.replace(",", "")
    return (digits if digits.isdigit() else answer).strip()


# Not a regular expression: `.*?\$(.*?)\$.*$` is quadratic in the dollar signs of a text without a match.


def _between_dollar_signs(answer: str) -> str:
    """Return the text between the first two dollar signs of a single line; other text unchanged."""
    line = answer.removesuffix("\n")
    parts = line.split("$", 2)
    return parts[1] + answer[len(line) :] if len(parts) == 3 and "\n" not in line else answer


def _without_styles(line: str) -> str:
    """Return the line without `\\text{` and its like, each with the next closing brace."""
    kept, start, last = [], 0, line.rfind("}")
    while (found := _STYLE.search(line, start)) and found.end() <= last:
        end = line.index("}", found.end())
        kept += [line[start : found.start()], line[found.end() : end]]
        start = end + 1
    return "".join(kept) + line[start:]


def _without_box(line: str) -> str:
    """Return the line without its first `\\boxed{` and its last closing brace."""
    start, end = line.find(_BOX), line.rfind("}")
    content = start + len(_BOX)
    return line[:start] + line[content:end] + line[end + 1 :] if start >= 0 and content <= end else line


def score(response: str, ground_truth: str) -> Score:
    """Return +1 for the ground truth, -1 otherwise."""
    extracted = extract_answer(response)
    answer = None if extracted is None else normalize(extracted)
    return binary_score(answer == normalize(ground_truth), answer)
