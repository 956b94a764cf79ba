r"""Mathematical equality, exact first: rationals, symbols and irrational numbers are never compared by rounding.

A decimal (`0.333333`) stands for every number that rounds to it: within its last digit, and within a relative 1e-6. All
other numbers are compared exactly. math-verify's grader handles sets, intervals, matrices and relations; its
comparisons of single expressions, which round to a fixed number of digits, are replaced by these.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

from latex2sympy2_extended import latex2sympy2
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, latex2sympy, normalize_latex
from math_verify import grader
from sympy import (
    Eq,
    Expr,
    Float,
    I,
    Integer,
    MatrixBase,
    Mul,
    Rational,
    S,
    Symbol,
    Tuple,
    UnevaluatedExpr,
    expand,
    nan,
    oo,
    solveset,
    zoo,
)
from sympy import simplify as sympy_simplify
from sympy.core.relational import Relational

RELATIVE_TOLERANCE = Rational(1, 10**6)  # of decimals
_DIGITS = (60, 400)  # of irrational numbers: few suffice to show a difference, many are needed to show equality
_AGREEMENT = {
    digits: Float(f"1e-{digits * 3 // 4}", digits) for digits in _DIGITS
}  # relative difference of equal numbers
_UNKNOWN_PRECISION = 10  # bits: a number that evalf returns with at most these is indistinguishable from zero
# Single letters that the library would drop as units (`2d`) are variables; `to_latex` has removed real units.
_NORMALIZATION = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
_EQUALS = re.compile(r"(?<!\\|\<|\!|\>)=")
_INTEGER, _DECIMAL = re.compile(r"[-+]?\d{1,2000}", re.ASCII), re.compile(r"[-+]?\d+\.\d+", re.ASCII)
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{(\d+)\}\{(\d+)\}", re.ASCII)
_PAIR = re.compile(r"\s*[(\[](.*,.*)[)\]]\s*", re.DOTALL)
_PERCENT = UnevaluatedExpr(Rational(1, 100))
# Values of variables: first positive, then of both signs.
_POSITIVE = tuple(Rational(*pair) for pair in ((7, 5), (3, 7), (11, 4), (13, 9), (5, 3), (17, 8), (2, 11), (23, 6)))


def parse(latex: str) -> Any:
    """Return a SymPy object; for an unreadable chain of equations, that of its last part.

    Raises:
        Exception: the parser cannot read it.
    """
    number = _plain_number(latex)
    if number is not None:
        return number
    text = normalize_latex(latex, config=_NORMALIZATION)
    try:
        found = _sympy(text)
    except Exception:
        parts = _EQUALS.split(text)
        if len(parts) <= 2 or "," in text or ";" in text:
            raise
        found = _sympy(parts[-1])
    if found is S.EmptySet and (pair := _PAIR.fullmatch(text)):  # an interval with its end before its start is a pair
        found = Tuple(*_sympy(pair[1])._unsorted_args)
    if found is None:
        raise ValueError(f"not a mathematical expression: {latex!r}")
    if re.search(r"(?<![A-Za-z])i\s*=|(?<![A-Za-z])i\s*\\in", text):  # an index
        return found
    return found.xreplace({Symbol("i", real=True): I}) if hasattr(found, "xreplace") else found


def _plain_number(latex: str) -> Any:
    """Return an integer, a decimal or a fraction of integers, or None.

    Most answers in training data are of this form, and the grammar takes a hundred times as long for them.
    """
    if _INTEGER.fullmatch(latex):
        return Integer(latex)
    if _DECIMAL.fullmatch(latex):
        return Float(latex)
    fraction = _FRACTION.fullmatch(latex)
    if fraction and int(fraction[3]):
        return Rational(int(fraction[1] + fraction[2]), int(fraction[3]))
    return None


def _sympy(text: str) -> Any:
    return latex2sympy(text, is_real=True, convert_degrees=False, normalization_config=None)


def _refuse_juxtaposed_integers(parser: Any) -> None:
    """Make the parser raise ValueError for `{7}{5}` and `7\\ {5}`, which it would add as if 5 were a fraction after 7.

    It converts the factors of a product one by one with `convert_postfix`, and what follows a factor with another call
    of `convert_postfix_list`.
    """
    convert, convert_all = parser.convert_postfix, parser.convert_postfix_list

    def convert_postfix(self: Any, factor: Any) -> Any:
        self.factor = convert(self, factor)
        return self.factor

    def convert_postfix_list(self: Any, factors: Any, first: int = 0) -> Any:
        before = self.factor if first else None
        rest = convert_all(self, factors, first)
        if isinstance(before, Integer) and isinstance(rest, Integer):
            raise ValueError(f"adjacent integers: {before} and {rest}")
        return rest

    parser.convert_postfix, parser.convert_postfix_list = convert_postfix, convert_postfix_list


_refuse_juxtaposed_integers(latex2sympy2._Latex2Sympy)


def equal(truth: Any, answer: Any) -> bool:
    """Return whether two parsed answers are equal.

    Raises:
        Exception: it could not be decided.
    """
    return bool(grader.verify(truth, answer, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True))


def _expressions_equal(one: Any, other: Any, *_: Any) -> bool:
    if isinstance(one, MatrixBase) and isinstance(other, MatrixBase):
        return one.shape == other.shape and all(map(_expressions_equal, one.flat(), other.flat()))
    if not (isinstance(one, Expr) and isinstance(other, Expr)):
        return False
    if _numerator_of_percentage(one) == _numerator_of_percentage(other) is not None:
        return True
    return _scalars_equal(one.doit(), other.doit())


def _numerator_of_percentage(value: Any) -> Any:
    """Return 9 for `9` and for `9%`, which count as equal; None for anything but integers."""
    if isinstance(value, Mul) and len(value.args) == 2 and value.args[1] == _PERCENT:
        value = value.args[0]
    return value if isinstance(value, Integer) else None


def _scalars_equal(one: Any, other: Any) -> bool:
    if one == other:
        return True
    if any(value.has(oo, -oo, zoo, nan) for value in (one, other)):
        return False
    exact = [_without_floats(value) for value in (one, other)]
    if _exactly_equal(exact[0], exact[1]):
        return True
    if not one.has(Float) and not other.has(Float):
        return False
    last_digit = max((_last_digit(e) for e, v in zip(exact, (one, other), strict=True) if _is_decimal(v)), default=None)
    return _compare_values(exact[0], exact[1], _within(last_digit)) is True


def _without_floats(value: Any) -> Any:
    """Return the value with every decimal as an exact fraction."""
    return value.xreplace({number: Rational(str(number)) for number in value.atoms(Float)})


def _is_decimal(value: Any) -> bool:
    return bool(isinstance(value, Float) or (-value).is_Float)


def _last_digit(value: Any) -> Any:
    """Return the place value of a decimal's last digit, at most that of the first place: 1/1000 for 2.517."""
    places = 1
    while (value * 10**places).q != 1 and places < 100:
        places += 1
    return Rational(1, 10**places)


def _exactly_equal(one: Any, other: Any) -> bool:
    if one.is_Rational and other.is_Rational:
        return bool(one == other)
    difference = one - other
    if difference.is_Rational:
        return bool(difference == 0)
    outcome = _compare_values(one, other, _agree)
    if outcome is None:
        return bool(sympy_simplify(difference) == 0)
    if outcome and not difference.free_symbols:
        difference = expand(difference)
        return bool(difference == 0) if difference.is_Rational else True
    return outcome


def _compare_values(one: Any, other: Any, same: Callable[[Any, Any], bool]) -> bool | None:
    """Compare at several values of the variables where both are real; None if that is inconclusive."""
    compared = 0
    values_elsewhere = []
    for point in _points(one.free_symbols | other.free_symbols):
        pair = [_value(side, point) for side in (one, other)]
        if any(value is None for value in pair):
            continue
        if all(value.is_real for value in pair):
            compared += 1
            if not same(*pair) or (same is _agree and not _agree_in_detail(one, other, point)):
                return False
        else:
            values_elsewhere.append(pair)
    if compared:
        return True
    return all(same(*pair) for pair in values_elsewhere) if values_elsewhere else None


def _points(symbols: set[Any]) -> Iterator[dict[Any, Any]]:
    if not symbols:
        yield {}
        return
    ordered = sorted(symbols, key=str)
    for number in range(6):
        values = list(islice(cycle(_POSITIVE), number, number + len(ordered)))
        signs = [1 if number < 3 or (number + place) % 2 else -1 for place in range(len(ordered))]
        scale = 1 + Rational(number, 13)
        yield {s: sign * value * scale for s, sign, value in zip(ordered, signs, values, strict=True)}


def _agree_in_detail(one: Any, other: Any, point: dict[Any, Any]) -> bool:
    r"""Return whether many more digits agree: `\sqrt{10^{60}+1}` and `10^{30}` differ in the 61st."""
    pair = [_value(side, point, _DIGITS[1]) for side in (one, other)]
    return any(value is None for value in pair) or _agree(pair[0], pair[1], _DIGITS[1])


def _value(expression: Any, point: dict[Any, Any], digits: int = _DIGITS[0]) -> Any:
    """Return a number, exact if rational; None if the expression has no value."""
    value = expression.subs(point) if point else expression
    if not value.is_Rational:
        value = value.evalf(digits, maxn=3 * digits)
        parts = [_known(part) for part in value.as_real_imag()] if value.is_number else [None]
        if any(part is None for part in parts):
            return None
        value = parts[0] + I * parts[1]
    return None if value.has(nan, zoo, oo, -oo) else value


def _known(part: Any) -> Any:
    """Return zero if the number is indistinguishable from it; None for anything but numbers."""
    if part.is_Rational:
        return part
    if not isinstance(part, Float):
        return None
    return Integer(0) if part._prec <= _UNKNOWN_PRECISION else part


def _agree(one: Any, other: Any, digits: int = _DIGITS[0]) -> bool:
    if getattr(one, "is_Rational", False) and getattr(other, "is_Rational", False):
        return bool(one == other)
    return bool(abs(one - other) <= _AGREEMENT[digits] * max(abs(one), abs(other)))


def _within(last_digit: Any) -> Callable[[Any, Any], bool]:
    def close(one: Any, other: Any) -> bool:
        difference = abs(one - other)
        limit = RELATIVE_TOLERANCE * max(abs(one), abs(other))
        return bool(difference <= limit and (last_digit is None or difference < last_digit))

    return close


def _relations_equal(truth: Any, answer: Any, *_: Any) -> bool:
    """Return whether two relations have the same solutions: as multiples of each other, or by solving them."""
    if truth.free_symbols != answer.free_symbols:
        return False
    if all(isinstance(relation, Eq) and relation.lhs.is_Symbol for relation in (truth, answer)):
        return False  # the sides were compared individually before
    ratio = _constant_ratio(truth.lhs - truth.rhs, answer.lhs - answer.rhs)
    if ratio is not None and type(truth) is type(answer):
        return isinstance(truth, Eq) or bool(ratio > 0)
    if isinstance(truth, Eq) and isinstance(answer, Eq) and len(truth.free_symbols) == 1:
        (symbol,) = truth.free_symbols
        found = [solveset(relation, symbol) for relation in (truth, answer)]
        return all(f.is_FiniteSet and not f.is_empty for f in found) and found[0] == found[1]
    if isinstance(truth, Relational) and len(truth.free_symbols) == 1:
        return bool(truth.as_set() == answer.as_set())
    return False


def _constant_ratio(one: Any, other: Any) -> Any:
    """Return the constant nonzero ratio of two expressions, or None.

    Evaluated numerically: SymPy's `simplify` would turn `30^{10^{20}}` into `10^{20} \\ln 30`.
    """
    ratio = None
    for point in _points(one.free_symbols | other.free_symbols):
        values = [_value(side, point) for side in (one, other)]
        if any(value is None or not value.is_real or value == 0 for value in values):
            continue
        here = values[0] / values[1]
        if ratio is not None and not _agree(ratio, here):
            return None
        ratio = here
    return ratio


def _replace(name: str, function: Callable[..., bool]) -> None:
    if not callable(getattr(grader, name, None)):
        raise ImportError(f"math_verify.grader has no {name}: this version of math-verify is not supported")
    setattr(grader, name, function)


_compare_symbols = grader.sympy_compare_symbols


def _symbols_equal(one: Any, other: Any) -> bool:
    """Return whether a symbol equals the other's value, `x` of `2x - x`, or its letters."""
    return _expressions_equal(one, other) or bool(_compare_symbols(one, other))


_replace("sympy_compare_symbols", _symbols_equal)
_replace("sympy_numeric_eq", _expressions_equal)
_replace("sympy_symbolic_eq", lambda one, other: False)
_replace("sympy_solve_and_compare", _relations_equal)
