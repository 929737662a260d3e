"""Decides whether two answers that were read are the same answer.

| Kind | Compared | Ignored |
|---|---|---|
| numbers, expressions | the exact value | how it is written |
| units and counted nouns | the unit, if both sides have one | a unit on one side only; other spellings of it |
| percent | `50\\%` is 1/2, not 50 | |
| bases | digits and base, if either side has one | |
| letters | case and order: ABC is neither BCA nor abc | fonts |
| words | every word, in order | fonts; a capital at the beginning of a word of four letters or more |
| lists of numbers | each as often as it occurs | order; what joins them; braces |
| lists of letters or words | order, and whether `and` or `or` joins them | |
| tuples, vectors | order | |
| intervals, inequalities | the numbers they contain | the variable, if one side has none |
| equations | the set of solutions, as far as a constant factor | sides, order of terms |
| `x = 5` | the name, if both sides have one | a name on one side only |
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from fractions import Fraction

from pmd.verifiers.mathematics.answers import (
    Answer,
    Based,
    Integers,
    Matrix,
    Quantity,
    Relation,
    Sequence,
    Words,
    as_interval,
    points_of,
)
from pmd.verifiers.mathematics.expressions import SHORT_WORDS, Apply, Expression, Number, Symbol
from pmd.verifiers.mathematics.regions import Region, points, same_region
from pmd.verifiers.mathematics.values import constant_ratio, rename, same_value


def is_same(gold: Answer, given: Answer) -> bool:
    """Return whether the given answer is the task's answer.

    Raises:
        TooLargeError: if that cannot be decided.
    """
    gold, given = _without_parameters(gold, given)
    gold, given = _unwrapped(gold, given), _unwrapped(given, gold)
    match gold, given:
        case Quantity(), Quantity():
            return _same_quantity(gold, given)
        case Based(), Based():
            return gold == given
        case Words(), Words():
            return _same_words(gold, given)
        case (Words(), Quantity()) | (Quantity(), Words()):
            return _same_letters(gold, given)
        case Sequence(), Sequence():
            return _same_sequence(gold, given)
        case Matrix(), Matrix():
            return _same_matrix(gold, given)
        case Integers(), Integers():
            return gold.domain == given.domain
    if isinstance(gold, Region) or isinstance(given, Region):
        left, right = _as_region(gold), _as_region(given)
        return left is not None and right is not None and same_region(left, right)
    left_relation, right_relation = _as_relation(gold), _as_relation(given)
    return left_relation is not None and right_relation is not None and _same_relation(left_relation, right_relation)


def _unwrapped(answer: Answer, other: Answer) -> Answer:
    """Return the one item of a list or set of one, unless the other side is a sequence too."""
    while isinstance(answer, Sequence) and len(answer.items) == 1 and not isinstance(other, Sequence):
        if answer.kind == "tuple" or isinstance(answer.items[0], Region):
            break
        answer = answer.items[0]
    return answer


def _without_parameters(gold: Answer, given: Answer) -> tuple[Answer, Answer]:
    """Bring `k \\in Z` together: rename the parameter, drop a condition that one side does not state."""
    left, right = _conditions(gold), _conditions(given)
    if not left and not right:
        return gold, given
    if left and right:
        if sorted(one.domain for one in left) != sorted(one.domain for one in right):
            return gold, Words(())
        if len(left) == len(right) == 1:
            given = _renamed(given, right[0].parameter, left[0].parameter)
    return _plain(gold), _plain(given)


def _conditions(answer: Answer) -> list[Integers]:
    items = answer.items if isinstance(answer, Sequence) and answer.kind == "list" else ()
    return [item for item in items if isinstance(item, Integers)]


def _plain(answer: Answer) -> Answer:
    if not isinstance(answer, Sequence) or not _conditions(answer):
        return answer
    items = tuple(item for item in answer.items if not isinstance(item, Integers))
    return items[0] if len(items) == 1 else replace(answer, items=items)


def _renamed(answer: Answer, old: str, new: str) -> Answer:
    if isinstance(answer, Sequence):
        return replace(answer, items=tuple(_renamed(item, old, new) for item in answer.items))
    return replace(answer, value=rename(answer.value, old, new)) if isinstance(answer, Quantity) else answer


def _same_quantity(gold: Quantity, given: Quantity) -> bool:
    if gold.name and given.name and gold.name != given.name:
        return False
    left, right = gold.unit.parts, given.unit.parts
    if left and right:
        return left == right and same_value(gold.value, given.value)
    if same_value(gold.value, given.value):
        return True
    return bool(left or right) and same_value(_with_letters(gold), _with_letters(given))


def _with_letters(quantity: Quantity) -> Expression:
    """Return the value times its unit as variables: `5 m` without \\text reads as a product."""
    factors = [quantity.value]
    for name, power in quantity.unit.parts:
        factors.append(Apply("^", (Symbol(name), Number(Fraction(power)))))
    return Apply("*", tuple(factors))


def _same_words(gold: Words, given: Words) -> bool:
    return len(gold.tokens) == len(given.tokens) > 0 and all(map(_same_word, gold.tokens, given.tokens))


def _same_word(left: str, right: str) -> bool:
    if left == right:
        return True
    if left.lower() != right.lower():
        return False
    is_word = len(left) > 3 and all(one[1:].islower() for one in (left, right))
    return is_word or left.lower() in SHORT_WORDS | {"true", "false", "none"}


def _same_letters(one: Words | Quantity, other: Words | Quantity) -> bool:
    """Return whether a run of small letters is the product of the other side: abc and `a \\cdot b \\cdot c`."""
    words, quantity = (one, other) if isinstance(one, Words) else (other, one)
    assert isinstance(words, Words)
    assert isinstance(quantity, Quantity)
    if not words.letters or len(words.tokens[0]) > 3 or not words.tokens[0].islower() or quantity.unit.parts:
        return False
    factors = quantity.value.arguments if isinstance(quantity.value, Apply) and quantity.value.name == "*" else ()
    names = [factor.name for factor in factors if isinstance(factor, Symbol)]
    return len(names) == len(factors) and sorted(names) == sorted(words.tokens[0])


def _same_sequence(gold: Sequence, given: Sequence) -> bool:
    kinds = {gold.kind, given.kind}
    if kinds == {"tuple", "set"}:
        return False
    if kinds == {"tuple"}:
        is_pair = len(gold.items) == 2
        return (gold.brackets == given.brackets or not is_pair or "[]" not in (gold.brackets, given.brackets)) and (
            _in_order(gold.items, given.items)
        )
    if kinds == {"tuple", "list"}:
        of_list, of_tuple = (gold, given) if gold.kind == "list" else (given, gold)
        is_interval = of_tuple.brackets == "[]" and len(of_tuple.items) == 2
        num_named = sum(bool(item.name) for item in of_list.items if isinstance(item, Quantity))
        are_alternatives = of_list.joined_by == "or" or num_named > _num_names(of_list)
        return not (is_interval or are_alternatives) and _in_order(gold.items, given.items)
    if _is_ordered(gold) or _is_ordered(given):
        return kinds == {"list"} and _same_joint(gold, given) and _in_order(gold.items, given.items)
    if kinds == {"list"} and _num_names(gold) != _num_names(given) and max(_num_names(gold), _num_names(given)) > 1:
        return _in_order(gold.items, given.items)
    left, right = list(gold.items), list(given.items)
    if "set" in kinds:
        left, right = _distinct(left), _distinct(right)
    return _in_any_order(left, right)


def _is_ordered(sequence: Sequence) -> bool:
    """Return whether a list or set holds letters or words; a set of letters has no order."""
    return sequence.kind == "list" and any(
        isinstance(item, Words)
        or (
            isinstance(item, Quantity)
            and isinstance(item.value, Symbol)
            and not item.name
            and len(item.value.name) == 1
        )
        for item in sequence.items
    )


def _same_joint(gold: Sequence, given: Sequence) -> bool:
    return (gold.joined_by == "or") == (given.joined_by == "or")


def _num_names(sequence: Sequence) -> int:
    return len({item.name for item in sequence.items if isinstance(item, Quantity) and item.name})


def _in_order(left: SequenceOf[Answer], right: SequenceOf[Answer]) -> bool:
    return len(left) == len(right) and all(map(is_same, left, right))


def _in_any_order(left: list[Answer], right: list[Answer]) -> bool:
    if len(left) != len(right):
        return False
    rest = list(right)
    for one in left:
        match = next((other for other in rest if is_same(one, other)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


def _distinct(items: list[Answer]) -> list[Answer]:
    found: list[Answer] = []
    for item in items:
        if not any(is_same(item, other) for other in found):
            found.append(item)
    return found


def _same_matrix(gold: Matrix, given: Matrix) -> bool:
    return (
        gold.is_determinant == given.is_determinant
        and [len(row) for row in gold.rows] == [len(row) for row in given.rows]
        and all(
            same_value(left, right)
            for one, other in zip(gold.rows, given.rows, strict=True)
            for left, right in zip(one, other, strict=True)
        )
    )


def _as_region(answer: Answer) -> Region | None:
    if isinstance(answer, Sequence) and answer.kind == "tuple":
        return as_interval(answer)
    if isinstance(answer, Quantity) and not answer.unit.parts:
        return replace(points([answer.value]), variable=answer.name)
    if isinstance(answer, Sequence):
        return points_of(answer)
    return answer if isinstance(answer, Region) else None


def _as_relation(answer: Answer) -> Relation | None:
    if isinstance(answer, Quantity) and answer.name and not answer.unit.parts:
        return Relation("=", Symbol(answer.name), answer.value)
    return answer if isinstance(answer, Relation) else None


def _same_relation(gold: Relation, given: Relation) -> bool:
    left, right = _one_sided(gold), _one_sided(given)
    if left.sign != right.sign:
        return False
    if same_value(left.left, right.left):
        return True
    ratio = constant_ratio(left.left, right.left)
    return ratio is not None and (ratio > 0 or left.sign in ("=", "!="))


def _one_sided(relation: Relation) -> Relation:
    """Return the relation of a difference to zero, as =, !=, < or <=."""
    left, right, sign = relation.left, relation.right, relation.sign
    if sign in (">", ">="):
        left, right, sign = right, left, "<" if sign == ">" else "<="
    return Relation(sign, Apply("+", (left, Apply("neg", (right,)))), Number(Fraction(0)))
