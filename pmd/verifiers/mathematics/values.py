"""What an expression is worth: exactly where it is rational, else to as many digits as the comparison needs.

Two constants are equal if both are rational and the same fraction, or if they agree to far more digits than their
parts can hide: when the smallest or largest part is 10^s, to 45 + 6s decimals. Nothing is rounded, so 0.333 is not 1/3.
Two expressions with variables are equal if they agree, in this sense, at several points drawn once and for all; a point
counts if either side is real there. Even powers, |x| and odd roots therefore behave as over the real numbers.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from random import Random
from typing import Any

import mpmath
from mpmath import mp

from pmd.verifiers.mathematics.expressions import Apply, Expression, Number, Symbol

MAX_BITS = 1 << 20  # of an exact number
MAX_SCALE = 2000.0  # decimal exponents; beyond, equality is not decided by digits
NUM_POINTS = 8
#: `log` without base may mean ln or log10: it is some multiple of ln and equals neither.
LOG_FACTOR = Fraction(40503, 65537)
Values = Mapping[str, Fraction]


class UndefinedError(ValueError):
    """The expression has no value: a division by zero, a function outside its domain."""


class TooLargeError(ValueError):
    """The value needs more digits than are computed."""


class NotRationalError(ValueError):
    """The value is not a rational number, as far as exact arithmetic can tell."""


def symbols(tree: Expression) -> frozenset[str]:
    """Return the variables; i, e, pi and infinity are none."""
    if isinstance(tree, Symbol):
        return frozenset() if tree.name in ("i", "e", "\\pi", "\\infty") else frozenset([tree.name])
    if isinstance(tree, Number):
        return frozenset()
    return frozenset().union(*map(symbols, tree.arguments))


def rename(tree: Expression, old: str, new: str) -> Expression:
    """Return the tree with another name for a variable."""
    if isinstance(tree, Symbol):
        return Symbol(new) if tree.name == old else tree
    if isinstance(tree, Number):
        return tree
    return Apply(tree.name, tuple(rename(part, old, new) for part in tree.arguments))


def same_value(left: Expression, right: Expression) -> bool:
    """Return whether two expressions are equal.

    Raises:
        TooLargeError: if that cannot be decided.
    """
    if left == right:
        return True
    names = sorted(symbols(left) | symbols(right))
    if not names:
        return bool(_same_at(left, right, {}))
    agreed = []
    for number in range(NUM_POINTS):
        values = _point(names, number)
        same = _same_at(left, right, values)
        if same is False:
            return False
        agreed.append(same)
    return agreed.count(True) >= NUM_POINTS // 4


def constant_ratio(left: Expression, right: Expression) -> Fraction | None:
    """Return the rational number by which two expressions with variables differ, None if there is none but zero."""
    names = sorted(symbols(left) | symbols(right))
    try:
        sides = [rational(tree, _point(names, 0)) for tree in (left, right)]
    except (UndefinedError, NotRationalError):
        if same_value(left, Apply("neg", (right,))):
            return Fraction(-1)
        return None
    if 0 in sides:
        return None
    ratio = sides[0] / sides[1]
    return ratio if same_value(left, Apply("*", (right, Number(ratio)))) else None


def rational(tree: Expression, values: Values | None = None) -> Fraction:
    """Return the exact value.

    Raises:
        NotRationalError, UndefinedError, TooLargeError: if there is none, or none that can be computed.
    """
    if isinstance(tree, Number):
        return tree.value
    if isinstance(tree, Symbol):
        if values and tree.name in values:
            return values[tree.name]
        raise NotRationalError(tree.name)
    if tree.name.startswith("call "):
        return _unknown_function(tree.name, [rational(part, values) for part in tree.arguments])
    if tree.name not in EXACT:
        raise NotRationalError(tree.name)
    found = EXACT[tree.name](*(rational(part, values) for part in tree.arguments))
    if max(found.numerator.bit_length(), found.denominator.bit_length()) > MAX_BITS:
        raise TooLargeError(tree.name)
    return found


def approximate(tree: Expression, digits: int) -> Any:
    """Return a constant to so many digits, as a number of mpmath.

    Raises:
        UndefinedError, TooLargeError: if there is none.
    """
    with mp.workdps(digits):
        return _Approximation({}).value(tree)


def _same_at(left: Expression, right: Expression, values: Values) -> bool | None:
    """Compare at one point; None if the point says nothing."""
    sides: list[Any] = []
    for tree in (left, right):
        try:
            sides.append(rational(tree, values))
        except NotRationalError:
            sides.append(None)
        except UndefinedError:
            sides.append("undefined")
    if "undefined" in sides:
        return None if sides[0] == sides[1] or None in sides else False
    if None not in sides:
        return sides[0] == sides[1]
    try:
        return _same_digits(left, right, values)
    except UndefinedError:
        return None if values else False


def _same_digits(left: Expression, right: Expression, values: Values) -> bool | None:
    scale = 0.0
    for tree in (left, right):
        with mp.workdps(30):
            rough = _Approximation(values)
            rough.value(tree)
        scale = max(scale, rough.scale)
    if scale > MAX_SCALE:
        raise TooLargeError("a magnitude")
    with mp.workdps(int(60 + 8 * scale)):
        found = [_Approximation(values).value(tree) for tree in (left, right)]
        tolerance = mpmath.mpf(10) ** -int(45 + 6 * scale)
        if values and all(abs(mpmath.im(value)) > tolerance for value in found):
            return None  # not real on either side
        return bool(abs(found[0] - found[1]) <= tolerance)


def _point(names: list[str], number: int) -> dict[str, Fraction]:
    """Return values for the variables: positive in the first half of the points, small in every second one."""
    random = Random(number)
    point = {}
    for name in names:
        digest = int.from_bytes(hashlib.sha256(f"{name} {number}".encode()).digest()[:4], "big")
        value = Fraction(random.randint(3, 400) + digest % 97, random.choice([7, 11, 13, 17, 19, 23]) * 5)
        value /= 16 if number % 2 else 1
        is_negative = number >= NUM_POINTS // 2 and (digest >> 8) % 2
        point[name] = -value if is_negative else value
    return point


def _unknown_function(name: str, arguments: list[Fraction]) -> Fraction:
    digest = hashlib.sha256(repr((name, arguments)).encode()).digest()
    return Fraction(int.from_bytes(digest[:4], "big") + 1, 1 << 31)


def _check_bits(bits: int) -> None:
    if bits > MAX_BITS:
        raise TooLargeError("an exact number")


def _inverse(number: Fraction) -> Fraction:
    if number == 0:
        raise UndefinedError("division by zero")
    return 1 / number


def _product(*factors: Fraction) -> Fraction:
    found = Fraction(1)
    for factor in factors:
        found *= factor
        _check_bits(max(found.numerator.bit_length(), found.denominator.bit_length()))
    return found


def _total(*terms: Fraction) -> Fraction:
    found = Fraction(0)
    for term in terms:
        found += term
        _check_bits(max(found.numerator.bit_length(), found.denominator.bit_length()))
    return found


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if base == 0 and exponent <= 0:
        raise UndefinedError("a power of zero")
    if exponent.denominator != 1:
        base = _exact_root(base, exponent.denominator)
    if base in (0, 1):
        return base
    _check_bits(abs(exponent.numerator) * max(base.numerator.bit_length(), base.denominator.bit_length()))
    return base**exponent.numerator


def _root(number: Fraction, degree: Fraction) -> Fraction:
    if degree.denominator != 1 or degree < 2:
        raise NotRationalError("a root")
    return _exact_root(number, degree.numerator)


def _exact_root(number: Fraction, degree: int) -> Fraction:
    """Return the root if it is rational; odd roots of negative numbers are negative."""
    if number < 0 and degree % 2 == 0:
        raise NotRationalError("a root of a negative number")
    if degree > 1000:
        raise NotRationalError("a high root")
    parts = []
    for part in (abs(number.numerator), number.denominator):
        root = math.isqrt(part) if degree == 2 else _integer_root(part, degree)
        if root**degree != part:
            raise NotRationalError("a root")
        parts.append(root)
    return Fraction(parts[0] if number >= 0 else -parts[0], parts[1])


def _integer_root(number: int, degree: int) -> int:
    """Return the largest integer whose power is at most the number, by Newton's method."""
    if number < 2:
        return number
    root = 1 << -(-number.bit_length() // degree)
    while True:
        better = ((degree - 1) * root + number // root ** (degree - 1)) // degree
        if better >= root:
            return root
        root = better


def _integer(number: Fraction) -> int:
    if number.denominator != 1:
        raise NotRationalError("not an integer")
    return number.numerator


def _factorial(number: Fraction) -> Fraction:
    n = _integer(number)
    if n < 0:
        raise UndefinedError("factorial of a negative number")
    _check_bits(n * max(1, n.bit_length()))
    return Fraction(math.factorial(n))


def _binomial(above: Fraction, below: Fraction) -> Fraction:
    k = _integer(below)
    if k < 0 or k > 2000:
        if above.denominator == 1 and 0 <= above < k:
            return Fraction(0)
        raise NotRationalError("a binomial coefficient")
    found = Fraction(1)
    for number in range(k):
        found *= (above - number) / (number + 1)
        _check_bits(found.numerator.bit_length())
    return found


def _modulo(number: Fraction, divisor: Fraction) -> Fraction:
    if divisor == 0:
        raise UndefinedError("division by zero")
    return number % divisor


EXACT: dict[str, Callable[..., Fraction]] = {
    "+": _total,
    "*": _product,
    "neg": lambda number: -number,
    "inv": _inverse,
    "^": _power,
    "root": _root,
    "!": _factorial,
    "abs": lambda number: abs(number),
    "floor": lambda number: Fraction(math.floor(number)),
    "ceil": lambda number: Fraction(math.ceil(number)),
    "binom": _binomial,
    "mod": _modulo,
    "max": max,
    "min": min,
    "gcd": lambda *numbers: Fraction(math.gcd(*map(_integer, numbers))),
    "lcm": lambda *numbers: Fraction(math.lcm(*map(_integer, numbers))),
}


class _Approximation:
    """Evaluates at mpmath's current precision and notes the scale: the largest |log10| of any part but zero."""

    def __init__(self, values: Values):
        self.values, self.scale = values, 0.0

    def value(self, tree: Expression) -> Any:
        found = self._value(tree)
        if not mpmath.isfinite(found):
            raise UndefinedError("not finite")
        size = abs(found)
        if size:
            magnitude = abs(int(mpmath.mag(size)))
            if magnitude > 10**30:
                raise TooLargeError("a magnitude")
            self.scale = max(self.scale, magnitude * 0.30103)
        return found

    def _value(self, tree: Expression) -> Any:
        if isinstance(tree, Number):
            return _mpf(tree.value)
        if isinstance(tree, Symbol):
            return self._symbol(tree.name)
        if tree.name.startswith("call "):
            return _mpf(rational(tree, self.values))
        arguments = [self.value(part) for part in tree.arguments]
        try:
            return self._apply(tree, arguments)
        except (ZeroDivisionError, ValueError) as error:
            if isinstance(error, TooLargeError | NotRationalError):
                raise
            raise UndefinedError(str(error)) from None
        except (OverflowError, MemoryError):
            raise TooLargeError(tree.name) from None

    def _symbol(self, name: str) -> Any:
        constants = {"\\pi": mp.pi, "e": mp.e}
        if name in self.values:
            return _mpf(self.values[name])
        if name in constants:
            return +constants[name]
        if name == "i":
            return mpmath.mpc(0, 1)
        raise UndefinedError(name)

    def _apply(self, tree: Apply, arguments: list[Any]) -> Any:
        first = arguments[0]
        match tree.name:
            case "+":
                return mpmath.fsum(arguments)
            case "*":
                return mpmath.fprod(arguments)
            case "neg":
                return -first
            case "inv":
                return 1 / first
            case "^":
                return self._to_the(first, arguments[1], tree.arguments[1])
            case "root":
                degree = arguments[1]
                is_odd = mpmath.isint(degree) and int(degree) % 2 == 1
                if mpmath.im(first) == 0 and mpmath.re(first) < 0 and is_odd:
                    return -mpmath.power(-mpmath.re(first), 1 / degree)
                return mpmath.sqrt(first) if degree == 2 else mpmath.power(first, 1 / degree)
            case "!":
                self._check_size(first)
                return mpmath.gamma(first + 1)
            case "binom":
                return mpmath.binomial(first, arguments[1])
            case "degree":
                return first * mp.pi / 180
            case "log" if len(arguments) == 1:
                return mpmath.log(first) * _mpf(LOG_FACTOR)
            case "log" | "lg" if len(arguments) == 2:
                return mpmath.log(first) / mpmath.log(arguments[1])
            case "lg":
                return mpmath.log10(first)
            case "max" | "min":
                return (max if tree.name == "max" else min)(arguments, key=mpmath.re)
        return self._function(tree.name, first)

    def _function(self, name: str, argument: Any) -> Any:
        found = {
            "abs": abs, "floor": mpmath.floor, "ceil": mpmath.ceil, "ln": mpmath.log, "exp": mpmath.exp,
            "sin": mpmath.sin, "cos": mpmath.cos, "tan": mpmath.tan, "cot": mpmath.cot, "sec": mpmath.sec,
            "csc": mpmath.csc, "arcsin": mpmath.asin, "arccos": mpmath.acos, "arctan": mpmath.atan,
            "arccot": mpmath.acot, "sinh": mpmath.sinh, "cosh": mpmath.cosh, "tanh": mpmath.tanh,
        }.get(name)  # fmt: skip
        if found is None:
            raise UndefinedError(name)
        if name in ("exp", "sinh", "cosh", "tanh", "sin", "cos", "tan", "cot", "sec", "csc"):
            self._check_size(argument)
        if name in ("floor", "ceil"):
            nearest = mpmath.nint(argument)
            if abs(argument - nearest) < mpmath.mpf(10) ** -(mp.dps // 2):
                return nearest  # an integer, up to rounding
        return found(argument)

    def _to_the(self, base: Any, exponent: Any, tree: Expression) -> Any:
        if base == 0:
            if mpmath.re(exponent) <= 0:
                raise UndefinedError("a power of zero")
            return mpmath.mpf(0)
        self._check_size(exponent)
        is_literal = isinstance(tree, Number | Apply) and not symbols(tree)
        if is_literal and mpmath.im(base) == 0 and mpmath.re(base) < 0:
            try:
                power = rational(tree)
            except (NotRationalError, UndefinedError):
                power = None
            if power is not None and power.denominator % 2:
                size = mpmath.power(-mpmath.re(base), _mpf(power))
                return -size if power.numerator % 2 else size
        return mpmath.power(base, exponent)

    def _check_size(self, number: Any) -> None:
        """Refuse exponents that would take more digits than MAX_SCALE to tell apart."""
        if abs(number) > 10 ** (MAX_SCALE / 20):
            raise TooLargeError("an exponent")


def _mpf(number: Fraction) -> Any:
    return mpmath.mpf(number.numerator) / number.denominator
