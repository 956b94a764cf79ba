# ruff: noqa: RUF001 -- the look-alike characters are what is tested
r"""Pairs of answers through the verifier's processes: what is equal, in many spellings, and what only looks so.

Each line is one pair, judged in both directions: as answer and ground truth, and the other way round.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_fipo.config import RewardConfig
from megatron_fipo.reward import RewardFunction, Score, make_reward

EQUAL = r"""
pi/2 == \frac{\pi}{2}
pi/2 == 1.5707963
-2*pi == -2\pi
-1 + exp(16) == -1+e^{16}
14.0 + -1.0i == 14 - i
14.0+-1.0i == 14 - i
10\,080 == 10080
10\;080 == 10080
10 080 == 10080
10{,}080 == 10080
10,\!080 == 10080
10'080 == 10080
1\,234\,567 == 1234567
90° == 90
90° == 90^\circ
90^{\circ} == 90
90 degrees == 90
90\text{ degrees} == 90^\circ
90\degree == 90
1/2^98 == \frac{1}{2^{98}}
10^-30 == \frac{1}{10^{30}}
1/2006! == \frac{1}{2006!}
2516_8 == 2516_{8}
2516_{8} == 1358
(2516)_8 == 2516_8
\text{2516}_8 == 2516_8
2516_{\text{eight}} == 2516_8
1A_{16} == 26
\log_2(8) == 3
\log_2 8 == 3
log_2(8) == 3
log2(8) == 3
sqrt(2)/2 == \frac{\sqrt{2}}{2}
2sqrt(3) == 2\sqrt{3}
sqrt(2+sqrt(3)) == \sqrt{2+\sqrt{3}}
sqrt2 == \sqrt{2}
sqrt12 == 2\sqrt{3}
√12 == 2\sqrt{3}
2^(n+1) == 2^{n+1}
x**2 == x^2
x^2 - 1 == (x-1)(x+1)
1e-5 == 0.00001
1.5e3 == 1500
2(3) == 6
2(x+1) == 2x+2
3 1/2 == 3.5
3\frac{1}{2} == 3.5
-3\frac{1}{2} == -3.5
3½ == 3.5
2x == 2x
5\text{ cm} == 5
5 cm == 5
12\,\text{km/h} == 12
\$5 == 5
5\text{ cm}^2 == 5
\text{13} == 13
\textbf{13} == 13
\mathbf{13} == 13
50\% == 0.5
50\% == 50
0.333333 == 1/3
1/3 == 0.3333333
0.\overline{3} == \frac13
0.1\overline{6} == \frac16
0.30000000000000004 == 0.3
sin(30°) == 1/2
\sin 30^\circ == \frac{1}{2}
\sin(\pi/6) == 0.5
e^{2i} == \cos 2 + i\sin 2
i^2 == -1
2i == 2 i
3+4j == 3+4i
a+bi == a + b i
exp(I*pi/3) == e^{i\pi/3}
\{1,2\} == \{2,1\}
(1,2) == (1, 2)
\begin{pmatrix}1/2&2\end{pmatrix} == \begin{bmatrix}0.5&2\end{bmatrix}
2x=4 == x=2
y=2x+1 == 2x+1
y=2x+1 == y-2x=1
x>2 == 2<x
(-\infty,2]\cup[3,\infty) == (-\infty, 2] \cup [3, \infty)
(-\infty,2]\cup[3,\infty) == (-infinity, 2] U [3, infinity)
oo == \infty
\sqrt{x^2} == |x|
abs(x) == |x|
\ln x + \ln y == \ln(xy)
\frac{x+1}{x-1} == (x+1)/(x-1)
1/(2*pi) == \frac{1}{2\pi}
1/2*pi == \frac{\pi}{2}
(\sqrt2+1)^2 == 3+2\sqrt{2}
\sqrt{2}\sqrt{3}-\sqrt{6} == 0
1,000 == 1000
1,000,000 == 10^6
1,000\pi == 1000\pi
1{,}000\pi == 1000\pi
2^{3^2} == 512
2^3^2 == 512
\binom{5}{2} == 10
5! == 120
factorial(5) == 120
n! == n!
f(x)+1 == 1+f(x)
f(x)=2x == 2x
\text{Monday} == Monday
\text{(B)} == B
\text{no solution} == no solution
x \in (1,2) == (1,2)
1<x<2 == (1,2)
\pm 3 == \{3,-3\}
±3 == \pm 3
1 \pm \sqrt2 == 1+\sqrt2, 1-\sqrt2
theta/2 == \frac{\theta}{2}
π/2 == \frac{\pi}{2}
2π == 2\pi
x² == x^2
x⁻¹ == \frac1x
−5 == -5
3×4 == 12
３７ == 37
0.5 == \frac{1}{2}
.5 == \frac{1}{2}
2.50 == 2.5
007 == 7
1.23457\cdot 10^{6} == 1234570
12:30 == 2:5
e == 2.718281828
\sum_{i=1}^{10} i == 55
2\frac{\pi}{3} == \frac{2\pi}{3}
\frac{\sqrt{2}}{2}3 == \frac{3\sqrt2}{2}
--5 == 5
1.2\times10^{-3} == 0.0012
0.1234567890123456789 == 0.1234567890123456789
2a+3b == 3b+2a
acos(0) == \frac{\pi}{2}
arctan(1) == \pi/4
cos(x)^2+sin(x)^2 == 1
2\cos^2 x - 1 == \cos 2x
\tan 45^\circ == 1
25^\circ C == 25^\circ C
x \ge 3 == [3, \infty)
1, 2, 3 == 3, 2, 1
1 and 2 == 1, 2
\frac{3}{4}\text{ inches} == 0.75
8 \text{ or } 9 == 8, 9
2*pi*r == 2\pi r
pi^2/6 == \frac{\pi^2}{6}
(1/2)*pi == \frac{\pi}{2}
1/2 pi == \frac{\pi}{2}
log(2)/log(3) == \frac{\log 2}{\log 3}
ln(2)/ln(3) == \frac{\ln 2}{\ln 3}
3 + 4*I == 3+4i
2*sqrt(2)*i == 2\sqrt{2}i
e^(i*pi) == -1
45 degrees == 45^\circ
2 ^ 10 == 1024
x = pi/4 == \frac{\pi}{4}
[0, pi/2] == [0, \frac{\pi}{2}]
(0, 2*pi) == (0, 2\pi)
{pi/2, -pi/2} == \{\frac{\pi}{2}, -\frac{\pi}{2}\}
{1, 2} == \{1,2\}
pi/2 + k*pi == \frac{\pi}{2}+k\pi
2*pi/3, 4*pi/3 == \frac{2\pi}{3}, \frac{4\pi}{3}
n(n+1)/2 == \frac{n^2+n}{2}
x^(1/3) == \sqrt[3]{x}
cbrt(2) == \sqrt[3]{2}
|x-1| == \left|x-1\right|
x >= 3 == x \ge 3
x >= 3 == [3, \infty)
1/sqrt(2) == \frac{\sqrt2}{2}
a*b/c == \frac{ab}{c}
5 * 10^6 == 5000000
6.02 x 10^23 == 6.02\times 10^{23}
6.02 × 10^23 == 6.02\cdot 10^{23}
tan(pi/4) == 1
arcsin(1/2) == \frac{\pi}{6}
sin^2(x) + cos^2(x) == 1
sin^2 x == (\sin x)^2
sqrt(x^2+1) == \sqrt{x^2+1}
sqrt(x)/2 == \frac12\sqrt{x}
sqrt 2 == \sqrt{2}
2 sqrt 3 == 2\sqrt{3}
3/4 pi r^3 == \frac34\pi r^3
(a+b)/(c+d) == \frac{a+b}{c+d}
-x/2 == -\frac{x}{2}
2^-3 == \frac18
2^{-3} == 0.125
10^(-3) == 0.001
e^-1 == \frac1e
e^(-x) == e^{-x}
e^x^2 == e^{x^2}
floor(7/2) == 3
ceil(7/2) == 4
1 000 000 == 10^6
12 345.67 == 12345.67
3.141 592 653 == 3.141592653
0.5e1 == 5
-1.5E+3 == -1500
3:4 == \frac34
5 : 2 == 2.5
1011_2 == 11
3F_{16} == 63
a_1 + a_2 == a_2+a_1
\frac{3}{4} + \frac{1}{4} == 1
180^\circ - \theta == 180-\theta
\frac{\pi}{2} \text{ radians} == \frac{\pi}{2}
5\,\mathrm{m} == 5
5\ \mathrm{m/s}^2 == 5
5 \text{m/s} == 5
20\% == 20
20 percent == 20\%
20 percent == 0.2
$5.00 == 5
\$1,234.50 == 1234.5
(1,234,567×3)⁻² == (3 \times 1234567)^{-2}
2 \cdot (1,234 \div 2) == 1234
€5 == 5
100 dollars == 100
\mathbb{R} == \mathbb{R}
\emptyset == \varnothing
x\in\mathbb{R} == \mathbb{R}
True == \text{True}
yes == \text{Yes}
(A) == A
\text{A} == A
\textbf{(A)} == A
A and B == A, B
7.0 == 7
7. == 7
+7 == 7
\boxed{7} == 7
$7$ == 7
\left\{1,2\right\} == \{1,2\}
\langle 1,2\rangle == \langle 1, 2\rangle
\begin{pmatrix}1\\2\end{pmatrix} == \begin{pmatrix} 1 \\ 2 \end{pmatrix}
(3, \pi/2) == (3, \frac{\pi}{2})
y = -2x + 3 == 2x + y = 3
y = -2x + 3 == y=3-2x
x^2 + y^2 = 4 == x^2+y^2-4=0
f(x) = x^2 == x^2
\sqrt{-4} == 2i
\log_{10} 100 == 2
\lg 100 == 2
\sum_{k=1}^{n} k == \frac{n(n+1)}{2}
\int_0^1 x dx == \frac12
\lim_{x\to 0} x == 0
5 + 3 \sqrt{2} == 3\sqrt2+5
\frac{2\sqrt{3}}{3} == \frac{2}{\sqrt{3}}
0 == -0
\pi == 3.141593
2^{1000} == 2^{1000}
90° == 90.0
exp(5) + 3!*5!\text{ cm} == e^{5} + (5! \cdot 3! + 5 - 5)\text{ cm}
12 + \pi\text{ cm} == \pi + 12\text{ cm}
sin(10,080) == \sin\left(10080\right)
(413,609,598,466)^2 == 413609598466^2
[95,357,849 + 3, \infty) == [95357852, \infty)
-(0 + (348,028,027,038 + 9 - 9)) == -348{,}028{,}027{,}038
(1,000, 2) == (1000, 2)
[-10,080, \infty) == [-10080, \infty)
[10*3,794,874, \infty) == [37948740, \infty)
(0 \times n + 100 \times 2006,\ 7) == (2006*100 + n*0,\ 7)
x == 2x - x
z = x×1×0×n == z = 0\times n
""".strip().splitlines()

DIFFERENT = r"""
pi/2 != \frac{\pi}{3}
-2*pi != 2\pi
-1 + exp(16) != 1+e^{16}
14.0 + -1.0i != 14 + i
10\,080 != 90
1\,234\,567 != 1234568
90° != 91
\frac{1}{2^{98}} != \frac{1}{2^{99}}
1/2^98 != 1/2^99
10^{-30} != 10^{-31}
1/2006! != 1/2004!
2516 != 2516_8
9_8 != 9
x_1 != x_2
sqrt(2)/2 != \frac{\sqrt{3}}{2}
x^2 - 1 != (x-1)(x+2)
2(3) != 5
3 1/2 != 2
1 2 != 3
3 5 != 8
2d != 2s
2d != 2
50\% != 5
0.3333 != 1/3
0.1\overline{6} != \frac15
3.14 != \pi
1000000.5 != 1000000.4
1000000 != 1000000.4
5 != 5.000001
0.0000001 != 0.0000002
(1,2) != (2,1)
(1/2^98, 1) != (1/2^99, 1)
\{\frac{1}{2^{98}}, 1\} != \{\frac{1}{2^{99}}, 1\}
[1/2^98, 1] != [1/2^99, 1]
x=\frac{1}{2^{98}} != x=\frac{1}{2^{99}}
\begin{pmatrix}2^{-98}&1\end{pmatrix} != \begin{pmatrix}2^{-99}&1\end{pmatrix}
x^2=-1 != x^2=-4
y=2x+1 != y=2x+2
x>2 != x\ge 2
x>2 != x<2
-\infty != \infty
\sqrt{x^2} != x
\pi + 10^{-60} != \pi
\frac{\pi}{2006!} != \frac{\pi}{2004!}
(1,000,2) != (1000, 2)
C(5,2) != 11
n! != (n+1)!
A != B
\frac{1}{0} != 7
x^2y != x^{2y}
10^{10} != 10^{11}
123456789012345678901234567890 != 123456789012345678901234567891
\frac{123456789012345678901}{7} != \frac{123456789012345678902}{7}
x/2^{98} != x/2^{99}
\frac{a}{b} != \frac{b}{a}
45^\circ != 46^\circ
e^(i*pi) != 1
x <= 3 != x < 3
x/2pi != \frac{x}{2\pi}y
1.234.567 != 1
1011_2 != 1011
FF_{16} != 255x
x_{12} != x_{13}
\text{The answer is } 5 != 6
yes != no
\text{yes} != \text{no}
\begin{pmatrix}1\\2\end{pmatrix} != \begin{pmatrix} 1 \\ 3 \end{pmatrix}
x^2 + y^2 = 4 != x^2+y^2=5
\frac{1}{3} != 0.33
0 != 10^{-100}
\pi != 3.1415
2006! != 2005!
2^{1000} != 2^{1000}+1
\frac{10^{50}+1}{10^{50}} != 1
\sqrt{10^{60}+1} != 10^{30}
e^{\pi\sqrt{163}} != 640320^3+744
\frac{1}{998001} != \frac{1}{998002}
1.0000001 != 1
x + 10^{-30} != x
-\frac{1}{2} != \frac{1}{2}
90° != 90.5
z = ln(30) + 10^(-20) != z = \ln 30
z = 10080 + ln(5) != z = (10080 + \ln 5)(1 + 10^{-30})
(2006*100 + n*0, 7) != (3*100 + n*0, 5)
(2\cdot 5, 3) != (3\cdot 5, 3)
""".strip().splitlines()


@pytest.fixture(scope="module")
def reward() -> Iterator[RewardFunction]:
    made = make_reward(RewardConfig(function="math", workers=2, timeout_seconds=60.0))
    yield made
    made.close()


@pytest.fixture(scope="module")
def verdicts(reward: RewardFunction) -> dict[tuple[str, str], Score]:
    """Return the scores of (answer, ground truth) pairs, all at once, which takes a second or two a hundred."""
    pairs = [tuple(line.split(mark)) for mark, lines in ((" == ", EQUAL), (" != ", DIFFERENT)) for line in lines]
    pairs += [(other, one) for one, other in pairs]
    scores = reward([rf"\boxed{{{a}}}" for a, _ in pairs], [t for _, t in pairs], [""] * len(pairs))
    return dict(zip(pairs, scores, strict=True))


@pytest.mark.parametrize("line", EQUAL)
def test_equal(verdicts: dict[tuple[str, str], Score], line: str) -> None:
    """Two spellings of one value are right, whichever of them is the ground truth."""
    one, other = line.split(" == ")
    assert [verdicts[pair].accuracy for pair in ((one, other), (other, one))] == [1.0, 1.0]


@pytest.mark.parametrize("line", DIFFERENT)
def test_different(verdicts: dict[tuple[str, str], Score], line: str) -> None:
    """Two values are wrong for each other, however near or alike."""
    one, other = line.split(" != ")
    assert [verdicts[pair].accuracy for pair in ((one, other), (other, one))] == [0.0, 0.0]
