r"""Conversion of answers as people and models write them to LaTeX that the parser reads.

`-2*pi`, `sqrt(2)/2`, `exp(16)` and `1e-5` are plain text, `10\,080` and `1 000` have digit groups, `90°` has a unit,
`2516_8` a base. The parser reads letters as factors, drops subscripts of numbers and adds adjacent numbers, so each of
these would have a wrong value. Uses only the standard library: the verifier's processes load this file by path.
"""

from __future__ import annotations

import re
from fractions import Fraction

_GREEK = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu"),
    *("xi", "pi", "rho", "sigma", "tau", "phi", "chi", "psi", "omega"),
)
_TRIGONOMETRIC = ("sin", "cos", "tan", "cot", "sec", "csc")
_INVERSES = {f"{prefix}{name}": rf"\arc{name}" for prefix in ("arc", "a") for name in ("sin", "cos", "tan")}
_WORDS = {
    **{name: rf"\{name} " for name in _GREEK},
    **{name: rf"\{name}" for name in (*_TRIGONOMETRIC, "sinh", "cosh", "tanh", "ln", "log", "exp", "sqrt")},
    **_INVERSES,
    **{name: rf"\{name}" for name in ("frac", "binom", "cdot", "times", "infty", "pm", "cup", "cap")},
    **dict.fromkeys(("infinity", "inf", "oo"), r"\infty "),
    **dict.fromkeys(("degrees", "degree", "deg"), r"^\circ "),
    "dfrac": r"\frac",
    "cbrt": r"\sqrt[3]",
    "binomial": r"\binom",
    "log2": r"\log_{2}",
    "log10": r"\log_{10}",
    "lg": r"\log_{10}",
}
_CALLS = ("abs", "floor", "ceil", "ceiling", "factorial")

_CHARACTERS = {
    **dict.fromkeys("\u2212\u2013\u2014\ufe63", "-"),
    **dict.fromkeys("\u00d7\u00b7\u22c5\u2219\u2217", r"\cdot "),
    **dict.fromkeys("\u00f7\u2215\u2044", "/"),
    **dict.fromkeys("\u00b0\u00ba\u02da", r"^\circ "),
    **dict.fromkeys("\u00a0\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B))), " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""),
    "\u221e": r"\infty ",
    "\u221a": r"sqrt",
    "\u221b": r"cbrt",
    "\u00b1": r"\pm ",
    "\u2213": r"\mp ",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u2260": r"\ne ",
    "\u2208": r"\in ",
    "\u2205": r"\emptyset ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2026": r"\ldots ",
    "\u2032": "'",
    "\u2019": "'",
    **dict(zip("αβγδεζηθικλμνξπρστφχψω", (rf"\{name} " for name in _GREEK), strict=True)),
    "\u00bd": r"\frac{1}{2}",
    "\u2153": r"\frac{1}{3}",
    "\u2154": r"\frac{2}{3}",
    "\u00bc": r"\frac{1}{4}",
    "\u00be": r"\frac{3}{4}",
    "\u215b": r"\frac{1}{8}",
    "\u2155": r"\frac{1}{5}",
    "\u2159": r"\frac{1}{6}",
    **{chr(0xFEE0 + code): chr(code) for code in range(0x21, 0x7F)},  # full-width forms
}
_TRANSLATION = str.maketrans(_CHARACTERS)
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "0123456789+-ni", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))

_STYLES = r"text|textbf|textit|textrm|textnormal|mathbf|mathrm|mathit|mathnormal|mbox|bm|boldsymbol|emph"
_STYLED_NUMBER = re.compile(rf"\\(?:{_STYLES})\s*\{{([-+\d\s.,/]+)\}}")
_WHOLLY_STYLED = re.compile(r"\\(?:mathbf|bm|boldsymbol|displaystyle|boxed|fbox|ensuremath)\s*\{(.*)\}", re.DOTALL)
_SPACES = re.compile(
    r"(?<!\\)(?:\\[,;:> ]|\\(?:thinspace|enspace|medspace|quad|qquad)(?![A-Za-z])|\\[hm]space\*?\{[^{}]*\})|~|[\t\n]"
)
_COMMA_IN_NUMBER = re.compile(r"(?<=\d)\s*(?:\{\s*,\s*\}|,\\!|\{\\,\}|\\!)\s*(?=\d{3})")
_GROUPED = re.compile(r"(?<![\d.,^_])\d{1,3}(?:(?P<mark>[ '_])\d{3})(?:(?P=mark)\d{3})*(?![\d'_])")
_GROUPED_BY_COMMA = re.compile(r"(?<![\d.,(\[{^_])[1-9]\d{0,2}(?:,\d{3})+(?!\d|\s*,\S)")  # `1,000, 2`
_OPERATORS = ("+", "-", "*", "/", "^", "!", r"\cdot", r"\times", r"\div")
_GROUPED_AFTER_BRACKET = re.compile(r"(?<=[(\[])[1-9]\d{0,2}(?:,\d{3})+(?!\d|\s*,\S)")
_BEFORE_ONE_NUMBER = re.compile(
    r"(?:[-+*/^]|\\cdot|\\times|(?:sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|abs)|\{)\s*(?:\\left\s*)?\($"
)
_GROUPED_DECIMALS = re.compile(r"(?<=\.)\d{3}(?: \d{3})*(?: \d{1,3})(?!\d)")
_REPEATING = re.compile(r"(?<!\d)(\d+)\.(\d*)(?:\\(?:overline|bar|dot)\s*\{(\d+)\}|\\(?:bar|dot) ?(\d))")
_REPEATING_IN_PARENTHESES = re.compile(r"(?<!\d)(\d+)\.()\((\d+)\)()")
_SCIENTIFIC = re.compile(r"(?<![A-Za-z\d.])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d{1,9})(?![\d.A-Za-z_])")
_TIMES_TEN = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*(?:\^|\*\*))")
_PLAIN_FRACTION = re.compile(r"(?<![\d./^_{}])(\d+)/(\d+)(?=\s+(?:[A-Za-z]|\\[A-Za-z]))")  # `1/2 pi` is half of pi
_WORD = re.compile(rf"\\(?:{_STYLES}|operatorname)\s*\{{[^{{}}]*\}}|\\[A-Za-z]+|[A-Za-z]+(?:10|2(?=\())?")
_DIGITS_IN_BASE = re.compile(
    r"(?<![A-Za-z\d^_.\\])(?:\((?P<round>[\dA-F]+)\)|(?P<bare>[\dA-F]*\d[\dA-F]*))\s*"
    r"_\s*(?:\{\s*(?:\\text\s*\{\s*)?(?P<braced>\w+)\s*\}?\s*\}|(?P<digit>\d{1,2}))(?![\d(])"
)
_BASES = {
    "two": 2,
    "three": 3,
    "four": 4,
    "five": 5,
    "six": 6,
    "seven": 7,
    "eight": 8,
    "nine": 9,
    "ten": 10,
    "twelve": 12,
    "sixteen": 16,
}
_DEGREES = re.compile(
    r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|(?<=\d)\s*\^\s*(?:\{\s*o\s*\}|o(?![A-Za-z])))"
)
_NUMBER_OF_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\\circ")
_POWER_OF_FUNCTION = re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc|ln|log)\s*\^\s*\d+)\\cdot \(")
_TRIGONOMETRY = re.compile(rf"\\(?:{'|'.join(_TRIGONOMETRIC)})(?![A-Za-z])")

_UNIT_WORDS = (
    *("mm", "cm", "km", "dm", "ft", "kg", "mg", "lb", "lbs", "ml", "mph", "kmh", "hr", "hrs", "min", "sec", "rad"),
    *("inch", "inches", "foot", "feet", "yard", "yards", "mile", "miles", "meter", "meters", "metre", "metres"),
    *("gram", "grams", "pound", "pounds", "liter", "liters", "litre", "litres", "gallon", "gallons", "unit", "units"),
    *("second", "seconds", "minute", "minutes", "hour", "hours", "day", "days", "week", "weeks", "month", "months"),
    *(
        "year",
        "years",
        "cent",
        "cents",
        "dollar",
        "dollars",
        "euro",
        "euros",
        "USD",
        "radian",
        "radians",
        "way",
        "ways",
    ),
    *(
        "point",
        "points",
        "people",
        "person",
        "student",
        "students",
        "apple",
        "apples",
        "ball",
        "balls",
        "time",
        "times",
    ),
    *("square", "squared", "cubic", "cubed", "per", "sq", "cu"),
)
_UNIT = rf"(?:{'|'.join(sorted(_UNIT_WORDS, key=len, reverse=True))})(?:\s*\^\s*\{{?[-\d]+\}}?)?"
_UNITS = re.compile(rf"(?<=[\d}})\s!|\]])\s*{_UNIT}(?:[\s/*]+{_UNIT})*$")
_UNITS_IN_TEXT = re.compile(
    rf"(?<=[\d}})\s!|\]])\s*(?:\\(?:{_STYLES})\s*\{{\s*(?!and|or)[^{{}}\d=]*\}}(?:\s*\^\s*\{{?[-\d]+\}}?)?[\s/]*)+$"
)
_UNIT_AFTER_LETTER = re.compile(rf"(?<=[A-Za-z])\s*\\(?:{_STYLES})\s*\{{\s*{_UNIT}(?:[\s/*]+{_UNIT})*\s*\}}$")
_CURRENCY = re.compile(r"^\s*(?:\\\$|[$€£¥])\s*(?=[-\d.])")
_MIXED = re.compile(r"^\s*(-?)\s*(\d+)\s+(\d+)\s*/\s*(\d+)\s*$")
_MIXED_IN_LATEX = re.compile(r"^\s*(-?)\s*(\d+)\s*\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}\s*$")
_SIDE_BY_SIDE = re.compile(r"(?<![_\d.])\d[\d.]*+(?:\s+|\s*[$\"'`][\s$\"'`]*)\.?\d")
_UNION = re.compile(r"(?<=[\])])\s*(?:U|union)\s*(?=[\[(])")
_TOWER = re.compile(r"(?<=\^)(\d+|[A-Za-z])\s*\^\s*(\d+|[A-Za-z]|\{[^{}]*\})")


def to_latex(text: str) -> str:
    r"""Convert an answer to LaTeX: `-1 + exp(16)` to `-1 + \exp(16)`, `10\,080` to `10080`, `90°` to `90`.

    Raises:
        ValueError: adjacent numbers that are neither digit groups nor a mixed number.
    """
    text = _plain_characters(text)
    text = _joined_digits(text)
    text = _without_units(text)
    text = _mixed_number(text) or text
    text = _in_decimal(text)
    text = _REPEATING.sub(_repeating, _REPEATING_IN_PARENTHESES.sub(_repeating, text))
    text = _TIMES_TEN.sub(r"\\cdot ", _PLAIN_FRACTION.sub(r"\\frac{\1}{\2}", text))
    text = _SCIENTIFIC.sub(r"\1\\cdot 10^{\2}", text)
    text = text.replace("**", "^").replace("*", r"\cdot ")
    text = _with_words(_UNION.sub(r"\\cup ", text))
    text = _with_braces(text)
    text = _in_radians(text)
    text = re.sub(r"(?<=[\d)}])\s*i(?![A-Za-z])", " i", text)
    text = re.sub(r"(?<=\d)j(?![A-Za-z])", " i", text)
    text = re.sub(r"(?<![_\d])(\d+(?:\.\d+)?)\s*(?=\()", r"\1\\cdot ", text)  # `2(3)` is 6
    text = _POWER_OF_FUNCTION.sub(r"\1(", text)
    text = re.sub(r"\)\s*(?=\d)", r")\\cdot ", text)
    text = text.replace(r"\varnothing", r"\emptyset").replace(r"\lg", r"\log_{10}")
    text = text.strip()
    if _SIDE_BY_SIDE.search(re.sub(r"\\[dt]?frac\s*\d\s*\d", "", text)):
        raise ValueError(f"adjacent numbers: {text!r}")
    return text


def _plain_characters(text: str) -> str:
    for marks, sign in ((_SUPERSCRIPTS, "^"), (_SUBSCRIPTS, "_")):
        text = re.sub(f"[{''.join(marks)}]+", lambda m: f"{sign}{{{''.join(marks[c] for c in m[0])}}}", text)  # noqa: B023
    text = text.translate(_TRANSLATION).strip()
    while (whole := _WHOLLY_STYLED.fullmatch(text)) and _is_balanced(whole[1]):
        text = whole[1].strip()
    return _STYLED_NUMBER.sub(r"\1", text).strip().removesuffix(".").lstrip("=").strip()


def _is_balanced(text: str) -> bool:
    depth = 0
    for character in re.sub(r"\\.", "", text, flags=re.DOTALL):
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0


def _joined_digits(text: str) -> str:
    text = _COMMA_IN_NUMBER.sub("", text)
    text = _SPACES.sub(" ", text).replace(r"\!", "")
    text = _GROUPED_DECIMALS.sub(lambda m: m[0].replace(" ", ""), text)
    text = _GROUPED.sub(lambda m: re.sub(r"\D", "", m[0]), text)
    text = _GROUPED_BY_COMMA.sub(lambda m: m[0].replace(",", ""), text)
    return _GROUPED_AFTER_BRACKET.sub(_joined_unless_in_tuple, text)


def _joined_unless_in_tuple(found: re.Match[str]) -> str:
    """Join digit groups unless in a tuple: `(1,234)` is a pair, `(1,234 + x)` and `2(1,234)` have one number."""
    before, after = found.string[max(0, found.start() - 30) : found.start()], found.string[found.end() :].lstrip()
    is_factor = after.startswith(")") and after[1:].lstrip().startswith(_OPERATORS)
    one = after.startswith((*_OPERATORS, ",")) or is_factor or _BEFORE_ONE_NUMBER.search(before)
    return found[0].replace(",", "") if one else found[0]


def _without_units(text: str) -> str:
    """Remove units at the end and a currency before a number; single letters are variables."""
    text = _CURRENCY.sub("", text)
    if not _TRIGONOMETRY.search(text) and not re.search(rf"(?:{'|'.join(_TRIGONOMETRIC)})\s*\(", text):
        text = re.sub(r"(\d\s*)(?:degrees?|deg)(?![A-Za-z])", r"\1", text)
        text = _DEGREES.sub("", text)
    for pattern in (_UNITS_IN_TEXT, _UNIT_AFTER_LETTER, _UNITS):
        shorter = pattern.sub("", text).strip()
        text = shorter or text
    return text


def _mixed_number(text: str) -> str | None:
    """Convert `3 1/2` and `-3\\frac{1}{2}` to improper fractions."""
    found = _MIXED.match(text) or _MIXED_IN_LATEX.match(text)
    if not found:
        return None
    whole, top, bottom = (int(part) for part in found.groups()[1:])
    return rf"{found[1]}\frac{{{whole * bottom + top}}}{{{bottom}}}" if top < bottom else None


def _in_decimal(text: str) -> str:
    """Convert numbers with a base to decimal; invalid digits for the base leave them as words."""
    text = re.sub(rf"\\(?:{_STYLES})\s*\{{\s*([\dA-F]*\d[\dA-F]*)\s*\}}(?=\s*_)", r"\1", text)
    return _DIGITS_IN_BASE.sub(_number_of_base, text)


def _number_of_base(found: re.Match[str]) -> str:
    digits, name = found["round"] or found["bare"], (found["braced"] or found["digit"]).lower()
    base = _BASES.get(name, int(name) if name.isascii() and name.isdigit() else 0)
    if not 2 <= base <= 36:
        return found[0]
    try:
        return f"{int(digits, base)} "
    except ValueError:  # a digit that is invalid in the base
        return rf"\text{{{digits} to base {base}}}" if digits.isdigit() else found[0]


def _repeating(found: re.Match[str]) -> str:
    whole, start, *periods = found.groups()
    period = next(p for p in periods if p)
    value = Fraction(int(whole + start + period) - int(whole + start), 10 ** len(start) * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _with_words(text: str) -> str:
    def command(found: re.Match[str]) -> str:
        word = found[0]
        is_call = text[found.end() :].lstrip().startswith("(")
        if word in _CALLS and is_call:
            return rf"\{word}"
        before = text[: found.start()].rstrip()
        if word == "I" and (before.endswith(("*", r"\cdot")) or text[found.end() :].lstrip().startswith(r"\cdot")):
            return " i "
        return _WORDS.get(word, word)

    return _WORD.sub(command, text)


def _with_braces(text: str) -> str:
    r"""Add braces to arguments: `\sqrt(x)`, `\sqrt12`, `^(n+1)`, `^-3`, `\abs(x)` and similar."""
    text = re.sub(r"(\\sqrt(?:\[\d+\])?)\s*(\d+(?:\.\d+)?)", r"\1{\2}", text)
    text = re.sub(r"\^\s*([-+]\s*(?:\d+(?:\.\d+)?|[A-Za-z]|\\[a-z]+))", r"^{\1}", text)
    text = re.sub(r"\^\s*(\d+\.\d+)", r"^{\1}", text)
    text = _TOWER.sub(r"{\1^\2}", text)
    for opening, before, after in _PARENTHESIZED:
        text = _rewrite_calls(text, opening, before, after)
    return re.sub(r"\^\s*(\\sqrt(?:\[\d+\])?\{[^{}]*\})", r"^{\1}", text)


_PARENTHESIZED = (
    (r"\sqrt", r"\sqrt{", "}"),
    (r"\sqrt[3]", r"\sqrt[3]{", "}"),
    ("^", "^{", "}"),
    (r"\abs", r"\left|", r"\right|"),
    (r"\floor", r"\lfloor ", r"\rfloor "),
    (r"\ceil", r"\lceil ", r"\rceil "),
    (r"\ceiling", r"\lceil ", r"\rceil "),
    (r"\factorial", "(", ")!"),
)


def _rewrite_calls(text: str, opening: str, before: str, after: str) -> str:
    """Rewrite every `opening(...)`, also nested ones, as `before...after`."""
    start = 0
    while (at := text.find(opening, start)) >= 0:
        inside = at + len(opening)
        while inside < len(text) and text[inside] == " ":
            inside += 1
        end = _closing(text, inside)
        if end is None:
            start = at + len(opening)
            continue
        text = text[:at] + before + text[inside + 1 : end] + after + text[end + 1 :]
        start = at + len(before)
    return text


def _closing(text: str, opening: int) -> int | None:
    """Return the index of the parenthesis that closes the one at `opening`."""
    if opening >= len(text) or text[opening] != "(":
        return None
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    return None


def _in_radians(text: str) -> str:
    """Convert degrees inside trigonometric functions to radians, and drop their sign elsewhere."""
    text = _DEGREES.sub(r"^\\circ", text)
    if _TRIGONOMETRY.search(text):
        text = _NUMBER_OF_DEGREES.sub(r"(\\frac{\1\\pi}{180})", text)
    return text.replace(r"^\circ", "")
