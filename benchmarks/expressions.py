r"""Random mathematical expressions with known value: one, an equivalent, and a perturbed one, in several notations.

Values are computed independently, with 60 digits and for several values of the variables, so that equality of two
expressions is known without the verifier under test.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from mpmath import mp, mpf

DIGITS = 60
VARIABLES = ("x", "y", "n", "a")
_SAMPLES = tuple(
    {"x": a, "y": b, "n": c, "a": d} for a, b, c, d in (("1.7", ".3", "4.1", "2.9"), ("-2.3", "5.9", "-.7", "1.1"))
)
_EQUAL, _LARGEST = mpf(10) ** -45, mpf(10) ** 40


@dataclass(frozen=True)
class Node:
    """Expression: a leaf with its spelling, or an operator with its operands."""

    kind: str  # integer, constant, variable, root, power, exp, ln, sin, sum, product, quotient, negative, factorial
    parts: tuple[Node, ...] = ()
    value: Any = None


@dataclass(frozen=True)
class Case:
    truth: str
    answer: str
    equal: bool
    kind: str  # how the answer was derived


def make_case(seed: int) -> Case:
    """Return a pair of answers and whether they are equal; deterministic for each seed."""
    rng = random.Random(seed)
    while True:
        node = _random_node(rng, depth=rng.choice((1, 1, 2, 2, 3)))
        values = _values(node)
        if values is None:
            continue
        if rng.random() < 0.5:
            other, kind = _rewritten(node, rng), "rewritten"
        else:
            kind, other = _perturbed(node, rng)
        others = _values(other)
        if others is None:
            continue
        equal = all(abs(a - b) <= _EQUAL * max(abs(a), abs(b)) for a, b in zip(values, others, strict=True))
        if equal != (kind == "rewritten"):
            continue  # a perturbation without effect, or a loss of precision
        return _wrapped(_text(node, rng), _text(other, rng), equal, kind, rng)


# Generation of expressions


def _leaf(rng: random.Random) -> Node:
    pick = rng.random()
    if pick < 0.4:
        return Node("integer", value=rng.choice((0, 1, 2, 3, 5, 7, 10, 12, 16, 90, 100, 2006, 10080, 1234567)))
    if pick < 0.55:
        return Node("integer", value=rng.randint(1, 10 ** rng.randint(1, 25)))
    if pick < 0.7:
        return Node("constant", value=rng.choice(("pi", "e")))
    return Node("variable", value=rng.choice(VARIABLES))


def _random_node(rng: random.Random, depth: int) -> Node:
    if depth == 0:
        return _leaf(rng)
    kind = rng.choice(
        (
            "sum",
            "sum",
            "product",
            "product",
            "quotient",
            "quotient",
            "power",
            "root",
            "negative",
            "exp",
            "ln",
            "sin",
            "factorial",
        )
    )
    first = _random_node(rng, depth - 1)
    if kind in ("sum", "product", "quotient"):
        return Node(kind, (first, _random_node(rng, depth - 1)))
    if kind == "power":
        return Node(kind, (first,), rng.choice((-3, -2, -1, 2, 3, 10)))
    if kind == "root":
        return Node(kind, (Node("integer", value=rng.randint(2, 60)),))
    if kind == "ln":
        return Node(kind, (Node("integer", value=rng.randint(2, 60)),))
    if kind == "factorial":
        return Node(kind, (Node("integer", value=rng.choice((3, 5, 10, 50, 200))),))
    if kind == "exp":
        return Node(kind, (Node("integer", value=rng.randint(1, 20)),))
    return Node(kind, (first,))


def _integer(value: int) -> Node:
    return Node("integer", value=value)


def _rewritten(node: Node, rng: random.Random) -> Node:
    """Return an equivalent expression in another form."""
    parts = node.parts if node.kind == "factorial" else tuple(_rewritten(part, rng) for part in node.parts)
    node = Node(node.kind, parts, node.value)
    if node.kind in ("sum", "product") and rng.random() < 0.5:
        node = Node(node.kind, parts[::-1])
    pick, k = rng.random(), rng.randint(2, 9)
    if node.kind == "quotient" and pick < 0.5:
        return Node("quotient", tuple(Node("product", (_integer(k), part)) for part in node.parts))
    if node.kind == "product" and node.parts[1].kind == "sum" and pick < 0.7:
        a, (b, c) = node.parts[0], node.parts[1].parts
        return Node("sum", (Node("product", (a, b)), Node("product", (a, c))))
    if pick < 0.06:
        return Node("sum", (Node("sum", (node, _integer(k))), Node("negative", (_integer(k),))))
    if pick < 0.12:
        return Node("quotient", (Node("product", (node, _integer(k))), _integer(k)))
    if pick < 0.15:
        return Node("negative", (Node("negative", (node,)),))
    return node


def _perturbed(node: Node, rng: random.Random) -> tuple[str, Node]:
    """Return the kind of perturbation and an expression of a different value, near or far."""
    tiny = Node("power", (_integer(10),), -rng.choice((8, 20, 30)))
    changes: dict[str, Callable[[], Node]] = {
        "+1": lambda: Node("sum", (node, _integer(1))),
        "+tiny": lambda: Node("sum", (node, tiny)),
        "times 1+tiny": lambda: Node("product", (node, Node("sum", (_integer(1), tiny)))),
        "negated": lambda: Node("negative", (node,)),
        "doubled": lambda: Node("product", (_integer(2), node)),
        "a leaf changed": lambda: _with_other_leaf(node, rng),
    }
    kind = rng.choice(list(changes))
    return kind, changes[kind]()


def _with_other_leaf(node: Node, rng: random.Random) -> Node:
    if not node.parts:
        if node.kind == "integer":
            return _integer(node.value + rng.choice((1, 2, 10)))
        if node.kind == "constant":
            return Node("constant", value="e" if node.value == "pi" else "pi")
        return Node("variable", value=rng.choice([v for v in VARIABLES if v != node.value]))
    index = rng.randrange(len(node.parts))
    parts = [_with_other_leaf(part, rng) if i == index else part for i, part in enumerate(node.parts)]
    return Node(node.kind, tuple(parts), node.value)


# Values


def _values(node: Node) -> list[Any] | None:
    """Return the value at each sample; None if one is not finite or too large."""
    with mp.workdps(DIGITS):
        try:
            values = [_value(node, {name: mpf(v) for name, v in sample.items()}) for sample in _SAMPLES]
        except (ZeroDivisionError, ValueError, OverflowError):
            return None
        sizes = [abs(v) for v in values]
        return values if all(size == 0 or 1 / _LARGEST < size < _LARGEST for size in sizes) else None


def _value(node: Node, at: dict[str, Any]) -> Any:
    if node.kind == "integer":
        return mpf(node.value)
    if node.kind == "constant":
        return mp.pi if node.value == "pi" else mp.e
    if node.kind == "variable":
        return at[node.value]
    parts = [_value(part, at) for part in node.parts]
    first = +parts[0]
    match node.kind:
        case "sum":
            total = first + parts[1]
            # Cancellation loses precision.
            if total and abs(total) < mpf(10) ** -8 * abs(first) and node.parts[1].kind != "power":
                raise ValueError("cancellation")
            return total
        case "product":
            return first * parts[1]
        case "quotient":
            return first / parts[1]
        case "negative":
            return -first
        case "power":
            return first**node.value
        case "root":
            return mp.sqrt(first)
        case "ln":
            return mp.log(first)
        case "exp":
            return mp.exp(first)
        case "sin":
            if abs(first) > 10**6:
                raise ValueError("angle too large")
            value = mp.sin(first)
            if abs(value) < mpf(10) ** -20:
                return mpf(0)
            return value
        case "factorial":
            return mp.factorial(first)
    raise AssertionError(node.kind)


# Spellings


def _text(node: Node, rng: random.Random) -> str:
    return _Writer(rng.choice(("latex", "latex", "plain", "unicode")), rng).write(node)


@dataclass(frozen=True)
class _Writer:
    """One notation: `\\frac{\\pi}{2}`, `pi/2`, `π/2`."""

    style: str
    rng: random.Random

    def write(self, node: Node) -> str:
        return getattr(self, f"_{node.kind}")(node)

    def _integer(self, node: Node) -> str:
        digits = str(node.value)
        if len(digits) > 4 and self.rng.random() < 0.3:
            mark = (
                self.rng.choice((r"\,", "{,}", r"\;", r",\!")) if self.style == "latex" else self.rng.choice((" ", ","))
            )
            if mark != "," or self.style != "latex":
                head = len(digits) % 3 or 3
                return mark.join([digits[:head], *(digits[i : i + 3] for i in range(head, len(digits), 3))])
        return digits

    def _constant(self, node: Node) -> str:
        if node.value == "e":
            return "e"
        return {"latex": r"\pi", "plain": "pi", "unicode": "π"}[self.style]

    def _variable(self, node: Node) -> str:
        return str(node.value)

    def _sum(self, node: Node) -> str:
        first, second = node.parts
        if second.kind == "negative":
            return f"{self.write(first)} - {self._factor(second.parts[0])}"
        return f"{self.write(first)} + {self._factor(second) if second.kind == 'sum' else self.write(second)}"

    def _product(self, node: Node) -> str:
        mark = {
            "latex": self.rng.choice((r" \cdot ", r" \times ")),
            "plain": "*",
            "unicode": self.rng.choice("\u00d7\u00b7"),
        }
        return mark[self.style].join(self._factor(part) for part in node.parts)

    def _quotient(self, node: Node) -> str:
        top, bottom = node.parts
        if self.style == "latex":
            command = self.rng.choice((r"\frac", r"\dfrac", r"\tfrac"))
            return f"{command}{{{self.write(top)}}}{{{self.write(bottom)}}}"
        return f"{self._factor(top)}/{self._atom(bottom)}"

    def _negative(self, node: Node) -> str:
        sign = "\u2212" if self.style == "unicode" else "-"
        return f"{sign}{self._factor(node.parts[0])}"

    def _power(self, node: Node) -> str:
        base = self._atom(node.parts[0])
        if self.style == "latex":
            return f"{base}^{{{node.value}}}"
        if self.style == "unicode":
            return base + str(node.value).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{base}{self.rng.choice(('^', '**'))}{node.value if node.value > 0 else f'({node.value})'}"

    def _call(self, name: str, node: Node) -> str:
        inside = self.write(node.parts[0])
        return rf"\{name}\left({inside}\right)" if self.style == "latex" else f"{name}({inside})"

    def _root(self, node: Node) -> str:
        inside = self.write(node.parts[0])
        return {"latex": rf"\sqrt{{{inside}}}", "plain": f"sqrt({inside})", "unicode": f"√({inside})"}[self.style]

    def _ln(self, node: Node) -> str:
        return self._call("ln", node)

    def _sin(self, node: Node) -> str:
        return self._call("sin", node)

    def _exp(self, node: Node) -> str:
        return f"e^{{{self.write(node.parts[0])}}}" if self.style == "latex" else self._call("exp", node)

    def _factorial(self, node: Node) -> str:
        return f"{self._atom(node.parts[0])}!"

    def _factor(self, node: Node) -> str:
        return f"({self.write(node)})" if node.kind in ("sum", "negative") else self.write(node)

    def _atom(self, node: Node) -> str:
        """Write an operand that is the base of a power or a denominator."""
        plain = node.kind in ("constant", "variable") or (node.kind == "integer" and node.value < 1000)
        return self.write(node) if plain else f"({self.write(node)})"


def _wrapped(truth: str, answer: str, equal: bool, kind: str, rng: random.Random) -> Case:
    """Wrap some pairs in a tuple, a set, an equation or a closed interval, or add a unit."""
    frames = ("({},\\ 7)", "\\{{ {}; 11 \\}}", "z = {}", "[{}, \\infty)", "{}\\text{{ cm}}", "\\left( {} \\right)")
    if rng.random() < 0.8:
        return Case(truth, answer, equal, kind)
    frame = rng.choice(frames)
    return Case(frame.format(truth), frame.format(answer), equal, f"{kind}, in {frame}")


def decimal_case(seed: int) -> Case:
    """Return a fraction and a decimal of at least 7 digits that it rounds to, or one that differs in the sixth."""
    rng = random.Random(seed)
    value = Fraction(rng.randint(1, 10**6), rng.randint(1, 10**4))
    digits = rng.randint(7, 12)
    text = f"{float(value):.{digits}g}"
    if "e" in text or "." not in text:
        return decimal_case(seed + 10**9)
    if rng.random() < 0.5:
        return Case(rf"\frac{{{value.numerator}}}{{{value.denominator}}}", text, True, "decimal")
    wrong = f"{float(value) * (1 + rng.choice((-1, 1)) * rng.uniform(3e-6, 1)):.{digits}g}"
    return Case(rf"\frac{{{value.numerator}}}{{{value.denominator}}}", wrong, False, "decimal, off")
