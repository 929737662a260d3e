"""Sets of real numbers that are unions of intervals and points: what inequalities and intervals describe."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cmp_to_key
from typing import Literal

import mpmath

from pmd.verifiers.mathematics.expressions import Apply, Expression, Symbol, UnreadableError
from pmd.verifiers.mathematics.values import TooLargeError, UndefinedError, approximate, same_value, symbols

INFINITY = Symbol("\\infty")
MINUS_INFINITY = Apply("neg", (INFINITY,))
MAX_PIECES = 100


@dataclass(frozen=True, slots=True)
class Interval:
    """From one end to the other; a point is an interval with equal, closed ends."""

    low: Expression
    high: Expression
    has_low: bool
    has_high: bool


@dataclass(frozen=True, slots=True)
class Region:
    """A union of disjoint intervals in ascending order, and the variable that was said to lie in it."""

    pieces: tuple[Interval, ...]
    variable: str = ""

    def union(self, other: "Region") -> "Region":
        """Return what lies in either."""
        return Region(_merged([*self.pieces, *other.pieces]), self.variable or other.variable)

    def intersection(self, other: "Region") -> "Region":
        """Return what lies in both."""
        found = [piece for left in self.pieces for right in other.pieces if (piece := _common(left, right))]
        return Region(_merged(found), self.variable or other.variable)

    def minus(self, other: "Region") -> "Region":
        """Return what lies in this one and not in the other."""
        rest = self
        for piece in other.pieces:
            outside = [
                Interval(MINUS_INFINITY, piece.low, False, not piece.has_low),
                Interval(piece.high, INFINITY, not piece.has_high, False),
            ]
            rest = rest.intersection(Region(tuple(one for one in outside if not _is_empty(one))))
        return rest


EMPTY = Region(())
REALS = Region((Interval(MINUS_INFINITY, INFINITY, False, False),))


def between(low: Expression, high: Expression, has_low: bool, has_high: bool) -> Region:
    """Return the interval; ends that are out of order are refused."""
    piece = Interval(low, high, has_low and not _is_infinite(low), has_high and not _is_infinite(high))
    if not symbols(low) | symbols(high) and _order(low, high) > 0:
        raise UnreadableError("an interval whose ends are out of order")
    return Region((piece,))


def ray(sign: Literal["=", "<", "<=", ">", ">=", "!="], end: Expression) -> Region:
    """Return the numbers that stand in this relation to `end`."""
    if sign in ("<", "<="):
        return Region((Interval(MINUS_INFINITY, end, False, sign == "<="),))
    return Region((Interval(end, INFINITY, sign == ">=", False),))


def without(point: Expression) -> Region:
    """Return all numbers but one."""
    return REALS.minus(points([point]))


def points(values: Iterable[Expression]) -> Region:
    """Return a finite set."""
    return Region(_merged([Interval(value, value, True, True) for value in values]))


def same_region(left: Region, right: Region) -> bool:
    """Return whether both contain the same numbers; a variable matters if both name one."""
    if left.variable and right.variable and left.variable != right.variable:
        return False
    return len(left.pieces) == len(right.pieces) and all(
        (one.has_low, one.has_high) == (other.has_low, other.has_high)
        and _same_end(one.low, other.low)
        and _same_end(one.high, other.high)
        for one, other in zip(left.pieces, right.pieces, strict=True)
    )


def _is_infinite(end: Expression) -> bool:
    return end in (INFINITY, MINUS_INFINITY)


def _same_end(left: Expression, right: Expression) -> bool:
    return left == right if _is_infinite(left) or _is_infinite(right) else same_value(left, right)


def _order(left: Expression, right: Expression) -> int:
    """Return -1, 0 or 1 as the left end lies below, at or above the right one."""
    if left == right or (not (_is_infinite(left) or _is_infinite(right)) and same_value(left, right)):
        return 0
    if _is_infinite(left) or _is_infinite(right):
        return 1 if left == INFINITY else 1 if right == MINUS_INFINITY else -1
    try:
        difference = approximate(Apply("+", (left, Apply("neg", (right,)))), 60)
    except (UndefinedError, TooLargeError):
        raise UnreadableError("ends that cannot be ordered") from None
    if mpmath.im(difference) != 0:
        raise UnreadableError("an end that is not real")
    return -1 if difference < 0 else 1


def _is_empty(piece: Interval) -> bool:
    order = _order(piece.low, piece.high)
    return order > 0 or (order == 0 and not (piece.has_low and piece.has_high))


def _common(left: Interval, right: Interval) -> Interval | None:
    order = _order(left.low, right.low)
    low = left if order > 0 else right
    has_low = left.has_low and right.has_low if order == 0 else low.has_low
    order = _order(left.high, right.high)
    high = left if order < 0 else right
    has_high = left.has_high and right.has_high if order == 0 else high.has_high
    found = Interval(low.low, high.high, has_low, has_high)
    return None if _is_empty(found) else found


def _merged(pieces: list[Interval]) -> tuple[Interval, ...]:
    """Sort the intervals and join those that touch."""
    if len(pieces) > MAX_PIECES:
        raise UnreadableError("too many intervals")
    merged: list[Interval] = []
    for piece in sorted(pieces, key=cmp_to_key(_by_low_end)):
        last = merged[-1] if merged else None
        gap = _order(last.high, piece.low) if last else -1
        if last is None or gap < 0 or (gap == 0 and not (last.has_high or piece.has_low)):
            merged.append(piece)
            continue
        order = _order(last.high, piece.high)
        high = last if order > 0 else piece
        has_high = last.has_high or piece.has_high if order == 0 else high.has_high
        merged[-1] = Interval(last.low, high.high, last.has_low, has_high)
    return tuple(merged)


def _by_low_end(left: Interval, right: Interval) -> int:
    return _order(left.low, right.low) or int(right.has_low) - int(left.has_low)
