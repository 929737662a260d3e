"""Reads one answer: a quantity, a number in a base, letters, words, a list, tuple, set, region, relation or matrix.

The structure is read first, its parts by `parse_expression`. A text of which no part is mathematics is words. An answer
may have several readings, because `1,234` is one number or two; the task's own answer has only the first.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from pmd.verifiers.mathematics.expressions import (
    SHORT_WORDS,
    Apply,
    Expression,
    Number,
    Symbol,
    UnreadableError,
    parse_expression,
)
from pmd.verifiers.mathematics.normalize import normalize, strip_ends
from pmd.verifiers.mathematics.regions import EMPTY, REALS, Region, between, points, ray, without
from pmd.verifiers.mathematics.units import Unit, split_unit
from pmd.verifiers.mathematics.values import same_value, symbols

RelationSign = Literal["=", "<", "<=", ">", ">=", "!="]


@dataclass(frozen=True, slots=True)
class Quantity:
    """An expression with an optional unit and, from `x = 5`, the name of what it is."""

    value: Expression
    unit: Unit = Unit()
    name: str = ""


@dataclass(frozen=True, slots=True)
class Based:
    """Digits in a base: `42_7`. Neither converted nor equal to the same digits without a base."""

    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Words:
    """Letters and words as written; `letters` are one run such as ABC, whose case and order count."""

    tokens: tuple[str, ...]
    letters: bool = False


@dataclass(frozen=True, slots=True)
class Sequence:
    """Several answers. The order of a list of numbers and of a set does not count, that of a tuple does."""

    kind: Literal["list", "tuple", "set"]
    items: tuple["Answer", ...]
    joined_by: Literal["and", "or", ""] = ""
    brackets: str = ""  # of a tuple


@dataclass(frozen=True, slots=True)
class Relation:
    """An equation or inequality that is no region of the line."""

    sign: RelationSign
    left: Expression
    right: Expression


@dataclass(frozen=True, slots=True)
class Integers:
    """The condition that a parameter is an integer: `k \\in \\mathbb{Z}`."""

    parameter: str
    domain: str


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of entries; the kind of brackets matters only for determinants."""

    rows: tuple[tuple[Expression, ...], ...]
    is_determinant: bool


Answer = Quantity | Based | Words | Sequence | Region | Relation | Integers | Matrix
GROUPED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")
#: `60 m/s`: letters behind a number and a space are a unit or a product.
UNIT_LETTERS = re.compile(r"(.*[\d})] )((?:[mgshLNJWVAKt])(?: ?\^ ?\{?\d\}?)?(?: ?/ ?[A-Za-z]+(?: ?\^ ?\{?\d\}?)?)?)")
IS_INTEGER = re.compile(r" ?\\text\{ ?(?:is|are) (?:an |any )?integers? ?\}")
#: What introduces `k \\in \\mathbb{Z}` behind a formula.
CONDITION = re.compile(
    r" ?(?:\\text\{ ?,? ?(?:for|where|with)(?: all| any| some| every)? ?\}|\() ?"
    r"([a-z] ?\\in ?\\mathbb\{[ZN]\})(?: ?\))?$"
)
LABEL = re.compile(
    r"^(?:\\text\{)? ?(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:(?:final|correct) )?"
    r"(?:answer|result|solution)s?(?: is| are|:| =)+ ?\}? ?(?=\S)",
    re.IGNORECASE,
)
BASED = re.compile(
    r"\(?(?P<digits>-?\d[0-9A-Za-z]*(?:\.[0-9A-Za-z]+)?)\)?_ ?(?:\{ ?)?(?P<base>\d+|\\text\{[a-z ]+\})(?: ?\})?"
)
BASE_NAMES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "twelve": 12,
    "sixteen": 16,
}  # fmt: skip
SIGNS: dict[str, RelationSign] = {"=": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!="}
TURNED: dict[RelationSign, RelationSign] = {"=": "=", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
CONNECTIVE = r"\\text\{ ?,? ?(?:and|or) ?\}|(?<![A-Za-z\\{])(?:and|or)(?![A-Za-z}])|\\land|\\lor"
OPENING, CLOSING = ("(", "[", "{", "\\lbrace", "\\langle"), (")", "]", "}", "\\rbrace", "\\rangle")
PIECE = re.compile(rf"{CONNECTIVE}|\\text\{{[^{{}}]*\}}|\\[A-Za-z]+|[A-Za-z]+|\d+|\S")
SETS = {"\\mathbb{R}": REALS, "\\emptyset": EMPTY, "\\lbrace \\rbrace": EMPTY, "\\lbrace\\rbrace": EMPTY}
PHRASES = {
    "all real numbers": REALS, "all reals": REALS, "all real x": REALS, "the set of all real numbers": REALS,
    "real numbers": REALS, "empty set": EMPTY, "the empty set": EMPTY, "no solution": EMPTY, "no solutions": EMPTY,
}  # fmt: skip
MATRIX = re.compile(r"\\begin ?\{(?P<kind>[pbvVB]?matrix|array)\}(?: ?\{[clr| ]+\})?(?P<rows>.*)\\end ?\{(?P=kind)\}")
MAX_ITEMS = 200


def read_answer(text: str, *, is_gold: bool = False) -> list[Answer]:
    """Return the readings of one answer, the likeliest first; none if there is nothing to read."""
    text = normalize(text)
    text = strip_ends(LABEL.sub("", IS_INTEGER.sub(r" \\in \\mathbb{Z}", text)))
    text = CONDITION.sub(r", \1", text)
    if not re.search(r"[^\W_]|\\", text):
        return []
    texts = [_grouped(text)]
    if GROUPED.search(text):
        is_listed = _in_brackets(text) and not re.search(r", ", text)
        texts = [text, texts[0]] if is_listed else [texts[0], *([text] if not re.search(r", ", text) else [])]
    if not is_gold and (letters := UNIT_LETTERS.fullmatch(texts[0])):
        texts.append(letters[1] + re.sub("[A-Za-z]+", r"\\text{\g<0>}", letters[2]))
    return [_read(one) for one in (texts[:1] if is_gold else texts)]


def _grouped(text: str) -> str:
    return GROUPED.sub(lambda found: found[0].replace(",", ""), text)


def _in_brackets(text: str) -> bool:
    found = GROUPED.search(text)
    return found is not None and bool(re.search(r"[(\[]|\\lbrace|\\langle", text[: found.start()]))


def _read(text: str) -> Answer:
    """Return the reading of a text, where `a ≈ b` is a, and `≈ b` is b."""
    before, _, after = text.partition("\\approx")
    text = strip_ends(before if before.strip() else after)
    try:
        return _structured(text)
    except (UnreadableError, RecursionError):
        return read_words(text)


def read_words(text: str) -> Words:
    """Return the words of a text: fonts and spacing removed, case and order kept."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text)
    run = plain.replace(" ", "")
    if re.fullmatch("[A-Za-z]{2,}", run) and (plain.strip() == run or all(len(one) == 1 for one in plain.split())):
        return Words((run,), letters=True)
    tokens = re.findall(r"\\[A-Za-z]+|[^\W\d_]+|\d+(?:\.\d+)?|\S", plain)
    return Words(tuple(token for token in tokens if token not in '."'))


def _structured(text: str) -> Answer:
    if text in SETS:
        return SETS[text]
    words = read_words(text)
    if region := PHRASES.get(" ".join(words.tokens).lower()):
        return region
    if words.letters and not _is_name(words.tokens[0]):
        return words
    if based := _based(text):
        return based
    items, joints = _split(text)
    return _joined(items, joints) if joints else _single(text)


def _is_name(run: str) -> bool:
    """Return whether a run of letters is `pi`, `xy` or the like, and no sequence of letters or word."""
    return run in ("pi", "infinity", "infty") or (len(run) == 2 and run.islower() and run not in SHORT_WORDS)


def _based(text: str) -> Based | None:
    found = BASED.fullmatch(re.sub(r"^\\text\{([0-9A-Fa-f]+)\}", r"\1", text))
    if found is None:
        return None
    name = re.sub(r"\\text\{ ?| ?\}", "", found["base"])
    base = int(name) if name.isdigit() else BASE_NAMES.get(name, 0)
    digits = found["digits"].upper()
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits if digit.isalnum()):
        raise UnreadableError(text)
    return Based(digits, base)


def _split(text: str) -> tuple[list[str], list[str]]:
    """Split at commas, semicolons and connectives outside all brackets; return the parts and what joined them."""
    parts, joints, depth, start, num_bars = [], [], 0, 0, 0
    for found in PIECE.finditer(text):
        piece = found[0]
        depth += _depth_change(piece)
        num_bars += piece == "|"
        is_connective = bool(re.fullmatch(CONNECTIVE, piece))
        if depth == 0 and num_bars % 2 == 0 and ((piece in ",;" and piece) or is_connective):
            part = text[start : found.start()].strip()
            joint = "or" if re.search(r"or(?![A-Za-z])", piece) else "and" if is_connective else ","
            start = found.end()
            if not part and joints and joint != ",":  # `a, and b`
                joints[-1] = joint
                continue
            parts.append(part)
            joints.append(joint)
    parts.append(text[start:].strip())
    if len(parts) > MAX_ITEMS or (joints and not all(parts)):
        raise UnreadableError(text)
    return parts, joints


def _joined(parts: list[str], joints: list[str]) -> Answer:
    found = [_single(part) for part in parts]
    if all(isinstance(one, Region) for one in found) and len(set(joints)) == 1 and joints[0] != ",":
        regions = [one for one in found if isinstance(one, Region)]
        if len({one.variable for one in regions if one.variable}) <= 1:
            return _combined(regions, joints[0])
    if "or" in joints and any(isinstance(one, Region) for one in found) and set(joints) == {"or"}:
        as_regions = [_as_region(one) for one in found]
        if all(as_regions):
            return _combined([one for one in as_regions if one], "or")
    items: list[Answer] = []
    for one in found:
        items += one.items if isinstance(one, Sequence) and one.kind == "list" else [one]
    named = "or" if "or" in joints else "and" if "and" in joints else ""
    return Sequence("list", tuple(_share_unit(_share_name(items))), named)


def _combined(regions: list[Region], joint: str) -> Region:
    combined = regions[0]
    for one in regions[1:]:
        combined = combined.union(one) if joint == "or" else combined.intersection(one)
    return combined


def _as_region(answer: Answer) -> Region | None:
    if isinstance(answer, Quantity) and answer.name and not answer.unit.parts:
        return replace(points([answer.value]), variable=answer.name)
    return answer if isinstance(answer, Region) else None


def _share_name(items: list[Answer]) -> list[Answer]:
    """Give `x = 1 or 2` its name once for all, so that it equals `1 or 2`."""
    named = [item.name for item in items if isinstance(item, Quantity)]
    if len(named) == len(items) and named[0] and not any(named[1:]):
        return [replace(item, name=named[0]) for item in items if isinstance(item, Quantity)]
    return items


def _share_unit(items: list[Answer]) -> list[Answer]:
    """Give `3 and 4 cm` its unit on both numbers."""
    last = items[-1]
    if not isinstance(last, Quantity) or not last.unit.parts:
        return items
    return [
        replace(item, unit=last.unit) if isinstance(item, Quantity) and not item.unit.parts else item for item in items
    ]


def _single(text: str) -> Answer:
    """Read a text without top-level commas."""
    text = strip_ends(text)
    for attempt in (_set_operation, _related, _bracketed, _matrix, _plus_minus):
        if (found := attempt(text)) is not None:
            return found
    words = read_words(text)
    if words.letters and not _is_name(words.tokens[0]):
        return words
    if based := _based(text):
        return based
    return _quantity(text)


def _quantity(text: str) -> Quantity:
    try:
        before, unit = split_unit(text)
        value = parse_expression(before)
    except UnreadableError:
        value, unit = parse_expression(text), Unit()
    if unit.factor != 1:
        value, unit = Apply("*", (value, Number(unit.factor))), replace(unit, factor=Fraction(1))
    if isinstance(value, Apply) and value.name == "degree" and not unit.parts:
        value, unit = value.arguments[0], Unit((("degree", 1),))
    return Quantity(value, unit)


def _depth_change(piece: str) -> int:
    """Return by how many brackets one is deeper inside behind a piece; a matrix counts as one."""
    opens = piece in OPENING or piece == "\\begin"
    return opens - (piece in CLOSING or piece == "\\end")


def _top_level(text: str, wanted: Callable[[str], bool]) -> list[tuple[int, int]]:
    """Return the places of pieces outside all brackets that are wanted."""
    places, depth = [], 0
    for found in PIECE.finditer(text):
        piece = found[0]
        depth += _depth_change(piece)
        if depth == 0 and wanted(piece):
            places.append(found.span())
    return places


def _cut(text: str, places: list[tuple[int, int]]) -> list[str]:
    starts = [0, *(end for _, end in places)]
    ends = [*(start for start, _ in places), len(text)]
    return [text[start:end].strip() for start, end in zip(starts, ends, strict=True)]


def _set_operation(text: str) -> Answer | None:
    """Read `x \\in A`, `A \\cup B`, `A \\cap B`, `\\mathbb{R} \\setminus \\{1\\}`."""
    if text in SETS:
        return SETS[text]
    if places := _top_level(text, lambda piece: piece == "\\in"):
        name, domain = _cut(text, places[:1])
        if domain in ("\\mathbb{Z}", "\\mathbb{N}", "\\mathbb{Z}^+", "\\mathbb{Z}^{+}", "\\mathbb{N}_0", "\\mathbb{Q}"):
            return Integers(_symbol(name), domain.replace("{+}", "+"))
        region = _region(domain)
        return replace(region, variable=_symbol(name))
    for sign in ("\\setminus", "\\cup", "\\cap"):
        places = _top_level(text, lambda piece, sign=sign: piece == sign)
        if places:
            parts = [_region(part) for part in _cut(text, places)]
            combined = parts[0]
            for one in parts[1:]:
                joined = {"\\cup": combined.union, "\\cap": combined.intersection, "\\setminus": combined.minus}
                combined = joined[sign](one)
            return combined
    return None


def _region(text: str) -> Region:
    """Read a set of real numbers.

    Raises:
        UnreadableError: if it is something else.
    """
    found = _single(text)
    if isinstance(found, Sequence):
        region = as_interval(found) or (points_of(found) if found.kind == "set" else None)
    else:
        region = found if isinstance(found, Region) else None
    if region is None:
        raise UnreadableError(text)
    return region


def points_of(sequence: Sequence) -> Region | None:
    """Return the set of the values in a sequence, or None if it holds anything else."""
    values = [item.value for item in sequence.items if isinstance(item, Quantity)]
    return points(values) if len(values) == len(sequence.items) else None


def as_interval(sequence: Sequence) -> Region | None:
    """Return the open or closed interval that a pair in round or square brackets can also mean."""
    values = [item.value for item in sequence.items if isinstance(item, Quantity)]
    if sequence.brackets not in ("()", "[]") or len(values) != 2 or len(sequence.items) != 2:
        return None
    closed = sequence.brackets == "[]"
    return between(values[0], values[1], closed, closed)


def _symbol(text: str) -> str:
    """Return the name of a variable, or of a function such as f(x); other texts are refused."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip()
    if re.fullmatch(
        r"\\frac ?\{d[A-Za-z]?\} ?\{d[A-Za-z]\}|[A-Za-z]\^\{-1\} ?\([a-z]\)|\\(?:vec|angle|overline)(?![A-Za-z]).*",
        text,
    ):
        return text.replace(" ", "")
    if re.fullmatch(r"[A-Za-z](?:_\{?\w+\}?)?'?(?: ?\([A-Za-z, ]+\))?|\\[A-Za-z]+|[A-Za-z][A-Za-z ]+", text):
        return re.sub(r"[{} ]", "", text)
    raise UnreadableError(text)


def _related(text: str) -> Answer | None:
    """Read a chain of =, <, >, \\le, \\ge and \\ne."""
    places = _top_level(text, lambda piece: piece in SIGNS)
    if not places:
        return None
    parts = _cut(text, places)
    signs: list[RelationSign] = [SIGNS[text[start:end]] for start, end in places]
    if not parts[0] or not parts[-1]:
        raise UnreadableError(text)
    if set(signs) == {"="}:
        return _equation(parts)
    if len(signs) == 1:
        return _inequality(parts[0], signs[0], parts[1])
    if len(signs) == 2 and not {"=", "!="} & set(signs):
        middle = _symbol(parts[1])
        first = _inequality(middle, TURNED[signs[0]], parts[0])
        second = _inequality(middle, signs[1], parts[2])
        if isinstance(first, Region) and isinstance(second, Region):
            return first.intersection(second)
    raise UnreadableError(text)


def _equation(parts: list[str]) -> Answer:
    """Read `x = 5` as a named quantity, `2 + 3 = 5` as its last part, `2x + y = 3` as a relation."""
    try:
        name = _symbol(parts[0])
    except UnreadableError:
        name = ""
    if name or len(parts) > 2:
        values = parts[1:] if name else parts
        answers = [_single(part) for part in values]
        last = answers[-1]
        if isinstance(last, Sequence) and last.kind == "list":
            return replace(last, items=tuple(_named(item, name) for item in last.items))
        if not all(_agree(one, last) for one in answers[:-1]):
            raise UnreadableError("a chain whose parts differ")
        return _named(last, name)
    left, right = (parse_expression(part) for part in parts)
    if not symbols(left) | symbols(right):
        if not same_value(left, right):
            raise UnreadableError("an equation that does not hold")
        return Quantity(right)
    return Relation("=", left, right)


def _agree(left: Answer, right: Answer) -> bool:
    return isinstance(left, Quantity) and isinstance(right, Quantity) and same_value(left.value, right.value)


def _named(answer: Answer, name: str) -> Answer:
    return replace(answer, name=name) if isinstance(answer, Quantity) else answer


def _inequality(left_text: str, sign: RelationSign, right_text: str) -> Answer:
    left, right = parse_expression(left_text), parse_expression(right_text)
    if isinstance(right, Symbol) and not symbols(left):
        left, right, sign = right, left, TURNED[sign]
    if isinstance(left, Symbol) and symbols(left) and not symbols(right):
        region = without(right) if sign == "!=" else ray(sign, right)
        return replace(region, variable=left.name)
    return Relation(sign, left, right)


def _bracketed(text: str) -> Answer | None:
    """Read a tuple, an interval or a set; None if the text is not enclosed by one pair of brackets."""
    found = re.match(r"\\lbrace|\\langle|[(\[\]]", text)
    end = re.search(r"(\\rbrace|\\rangle|[)\]\[])$", text)
    if not found or not end or found.end() > end.start():
        return None
    opening, closing, inside = found[0], end[0], text[found.end() : end.start()].strip()
    if not _encloses(text, found.end(), end.start()):
        return None
    if opening == "\\lbrace":
        return _set(inside) if closing == "\\rbrace" else None
    parts, joints = _split(inside)
    if set(joints) - {",", ";"} or not joints:
        return None
    is_pair = len(parts) == 2
    if opening == "]" or closing == "[" or (opening + closing in ("(]", "[)")):
        if not is_pair:
            raise UnreadableError(text)
        ends = [parse_expression(part) for part in parts]
        return between(ends[0], ends[1], opening == "[", closing == "]")
    items = tuple(_single(part) for part in parts)
    return Sequence("tuple", items, brackets=opening + closing)


def _encloses(text: str, start: int, end: int) -> bool:
    """Return whether the brackets between the two places are balanced in themselves."""
    depth = 0
    for found in PIECE.finditer(text[start:end]):
        depth += _depth_change(found[0])
        if depth < 0:
            return False
    return depth == 0


def _set(inside: str) -> Answer:
    if not inside:
        return EMPTY
    builder = re.match(r"(\\?[A-Za-z]+(?: ?\\in ?\\mathbb\{R\})?) ?[|:](.*)", inside)
    if builder:
        found = _structured(builder[2].strip())
        if isinstance(found, Region):
            return found
        raise UnreadableError(inside)
    parts, joints = _split(inside)
    if set(joints) - {",", ";"}:
        raise UnreadableError(inside)
    items: list[Answer] = []
    for part in parts:
        one = _single(part)
        items += one.items if isinstance(one, Sequence) and one.kind == "list" else [one]
    return Sequence("set", tuple(items))


def _matrix(text: str) -> Matrix | None:
    found = MATRIX.fullmatch(re.sub(r"^[(\[|] ?(\\begin.*\}) ?[)\]|]$", r"\1", text))
    if not found:
        return None
    lines = [line for line in found["rows"].split("\\newrow") if line.strip()]
    rows = tuple(tuple(parse_expression(entry.strip()) for entry in line.split("&")) for line in lines)
    if len({len(row) for row in rows}) != 1:
        raise UnreadableError(text)
    is_determinant = found["kind"] == "vmatrix" or text.startswith("|")
    return Matrix(rows, is_determinant)


def _plus_minus(text: str) -> Sequence | None:
    if "\\pm" not in text and "\\mp" not in text:
        return None
    both = [text.replace("\\pm", upper).replace("\\mp", lower) for upper, lower in ("+-", "-+")]
    return Sequence("list", tuple(_single(one) for one in both))
