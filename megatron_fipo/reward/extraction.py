r"""Answer extraction: the last `\boxed{}` or `Answer:` line of a response, if it is complete.

A response that ends in the middle of its last answer has none, even if it gave an earlier one: `First \boxed{5}. Wait,
so \boxed{6` is not an answer of 5.
"""

from __future__ import annotations

import re

from megatron_fipo.reward import dapo

_MARKS = r"[\s*_~`#]"  # Markdown
_OPENING = r"(?:[\s*_~`#$]|\\[\[(])"
# `Answer:`, `**Answer**: `, `\textbf{Answer:}`, `<b>Answer</b>:`, also with a full-width colon.
_ANSWER = re.compile(
    rf"answer(?:{_MARKS}|\}}|</\w+>)*[:\uff1a](?:{_MARKS}|\}}|</?\w+>)*(?P<math>\$+|\\[\[(])?{_OPENING}*(?P<line>[^\n]*)",
    re.IGNORECASE,
)
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
# Possessive, since backtracking over a long gap between the two repetitions would be slow.
_BETWEEN_BOXES = re.compile(r"[\s,;$]*+(?:and|or|\\text\{\s*+(?:and|or)\s*\})?[\s,;$]*")
_BROKEN_COMMAND = re.compile(r"\\(?:bo|box|boxe|boxed|fb|fbo|fbox)\s*$")
_TAGS = ("b", "i", "u", "em", "strong", "code", "p", "span")
_LEADING = re.compile(rf"(?:[\s$*`_]|\\[\[(]|</?(?:{'|'.join(_TAGS)})>)*")
_TRAILING = (r"\]", r"\)", *(f"{start}{tag}>" for tag in (*_TAGS, "s") for start in ("<", "</")))
_NEEDS_MORE = re.compile(
    r"(?:\\(?:[dt]?frac|sqrt|text|mathbf|mathrm|binom|left|right|cdot|times|begin)?|[-+*/^_=])\s*$"
)


def extract_answer(response: str) -> str | None:
    r"""Return the last `\boxed{}`, or the `Answer:` line after it; neighbours (`\boxed{1} and \boxed{2}`) are one list.

    None if there is neither, or if the response ends within its last answer.
    """
    start, boxed, unfinished = _last_boxes(response)
    tail_start = max(0, len(response) - dapo.SEARCHED_CHARACTERS)
    lines = list(_ANSWER.finditer(response, tail_start))
    line = lines[-1] if lines else None
    if unfinished > max(start, line.start() if line else -1):
        return None
    if line is None or line.start() < start:
        return boxed
    if line.end() == len(response) and not _is_finished(line):
        return None
    return unwrapped(line["line"]) or None


def unwrapped(text: str) -> str:
    """Return the text without surrounding dollar signs, markup and full stop. Linear in the text."""
    leading = _LEADING.match(text)
    assert leading is not None
    start, end = leading.end(), len(text)
    while end > start:
        if text[end - 1].isspace() or text[end - 1] in "$*`_.":
            end -= 1
        elif trailing := next((t for t in _TRAILING if text.endswith(t, start, end)), None):
            end -= len(trailing)
        else:
            break
    return text[start:end]


def _is_finished(line: re.Match[str]) -> bool:
    """Return whether an answer at the end of the response has balanced brackets and dollar signs."""
    text = re.sub(r"\\[{}$]|\\\\", "", line["line"]).rstrip("*_` ")
    if not text or _NEEDS_MORE.search(text):
        return False
    opened = line["math"] or ""
    if text.count("{") > text.count("}"):
        return False
    if sum(map(text.count, "([")) > sum(map(text.count, ")]")) - (opened in (r"\(", r"\[")):
        return False
    return not opened.startswith("$") or text.count("$") > 0


def _last_boxes(text: str) -> tuple[int, str | None, int]:
    """Return start and content of the last run of closed boxes, and start of the last unclosed box.

    -1 and None without a closed box, -1 without an unclosed one. Linear in the text.
    """
    open_braces: list[tuple[int, int] | None] = []  # of a box: start, and start of its content
    boxes: list[tuple[int, int, int]] = []  # start, content start, content end
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "{":
            open_braces.append(None)
        elif token == "}":
            box = open_braces.pop() if open_braces else None
            if box is not None:
                while boxes and boxes[-1][0] > box[0]:  # the boxes inside this one
                    boxes.pop()
                boxes.append((*box, match.start()))
        elif token.endswith("{") and len(token) > 2:
            open_braces.append((match.start(), match.end()))
    broken = _BROKEN_COMMAND.search(text, max(0, len(text) - dapo.SEARCHED_CHARACTERS))
    opened = [box[0] for box in open_braces if box is not None]
    unfinished = broken.start() if broken else max(opened, default=-1)
    if not boxes:
        return -1, None, unfinished
    first = len(boxes) - 1
    while first > 0 and _BETWEEN_BOXES.fullmatch(text, boxes[first - 1][2] + 1, boxes[first][0]):
        first -= 1
    contents = dict.fromkeys(unwrapped(text[begin:end]) for _, begin, end in boxes[first:])
    return boxes[first][0], ", ".join(contents), unfinished
