"""Judges a completion's final answer against the task's answer; no text makes it raise."""

import re
from dataclasses import dataclass
from fractions import Fraction

from pmd.verifiers.mathematics.answers import Answer, Quantity, Sequence, Words, read_answer
from pmd.verifiers.mathematics.compare import is_same
from pmd.verifiers.mathematics.expressions import Expression, Number, UnreadableError, is_broken
from pmd.verifiers.mathematics.extract import BOX, FORMULA, final_answer
from pmd.verifiers.mathematics.normalize import normalize
from pmd.verifiers.mathematics.regions import Region
from pmd.verifiers.mathematics.symbolic import compute
from pmd.verifiers.mathematics.values import (
    NotRationalError,
    TooLargeError,
    UndefinedError,
    approximate,
    rational,
    symbols,
)

MAX_GOLD = 10_000  # characters
MAX_GOLD_WORDS = 12
MAX_SHOWN_BITS = 4000  # a longer number is shown as it was written


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether the answer is right, and what was read on both sides; `answer` is None if there is none."""

    correct: bool
    answer: str | None
    gold: str


def judge(gold_text: str, completion_text: str, *, is_tagged: bool = False) -> Judgement:
    """Compare the final answer of the completion, or of what stood in its `<answer>`, with the task's answer."""
    gold_inside = _gold_inside(gold_text)
    golds = read_answer(compute(normalize(gold_inside)), is_gold=True)
    shown = describe(golds[0], gold_inside) if golds else gold_inside
    given_text = final_answer(completion_text, is_tagged=is_tagged)
    if given_text is None:
        return Judgement(False, None, shown)
    readings = read_answer(compute(normalize(given_text)))
    if not readings:
        return Judgement(False, None, shown)
    correct = any(_same(gold, given, gold_inside, given_text) for gold in golds for given in readings)
    if not (correct or is_tagged) and isinstance(readings[0], Words) and given_text == completion_text:
        return Judgement(False, None, shown)  # a text without box, tag or cue that is no mathematics
    return Judgement(correct, describe(readings[0], given_text), shown)


def gold_problem(gold_text: str) -> str | None:
    """Return why a task's answer cannot be judged, or None."""
    if len(gold_text) > MAX_GOLD:
        return f"has {len(gold_text):,} characters, more than {MAX_GOLD:,}"
    inside = _gold_inside(gold_text)
    golds = read_answer(compute(normalize(inside)), is_gold=True)
    if not golds:
        return "holds neither mathematics nor words"
    if isinstance(golds[0], Words) and (problem := _words_problem(golds[0], inside)):
        return problem
    try:
        for value in _values(golds[0]):
            _check_defined(value)
    except UndefinedError:
        return "has no value (a division by zero, or a function outside its domain)"
    except TooLargeError:
        return "is too large to be computed"
    return None


def describe(answer: Answer, text: str) -> str:
    """Return the answer as it was read: the same text for 0.5 and 1/2."""
    if isinstance(answer, Sequence):
        parts = ", ".join(describe(item, "") for item in answer.items)
        if parts and ", , " not in f", {parts}, ":
            left, right = {"tuple": (answer.brackets[:1], answer.brackets[-1:]), "set": "{}"}.get(answer.kind, ("", ""))
            return f"{left}{parts}{right}"
    if isinstance(answer, Quantity) and isinstance(found := _exact(answer.value), Fraction):
        return f"{found} {answer.unit}".strip()
    if isinstance(answer, Words) and all(token.isalnum() for token in answer.tokens):
        return " ".join(answer.tokens)
    return normalize(text)


def _exact(value: Expression) -> Fraction | None:
    try:
        found = rational(value)
    except (NotRationalError, UndefinedError, TooLargeError, RecursionError):
        return None
    return found if max(found.numerator.bit_length(), found.denominator.bit_length()) <= MAX_SHOWN_BITS else None


def _gold_inside(text: str) -> str:
    """Return the final answer in a task's answer that is a whole solution; most are nothing but the answer."""
    has_prose = FORMULA.search(text) and re.search(r"[A-Za-z]{2,}", FORMULA.sub("", text))
    if BOX.search(text) or "####" in text or has_prose:
        found = final_answer(text)
        return text if found is None else found
    return text


def _same(gold: Answer, given: Answer, gold_text: str, given_text: str) -> bool:
    try:
        if is_same(gold, given):
            return True
    except (TooLargeError, UnreadableError, RecursionError):
        return normalize(gold_text) == normalize(given_text)
    return False


def _words_problem(words: Words, text: str) -> str | None:
    names = [token for token in words.tokens if re.fullmatch(r"[^\W\d_]+", token)]
    if [name.lower() for name in names] == ["nan"]:
        return "is no number"
    if is_broken(normalize(text)):
        return "is mathematics that cannot be read"
    if len(names) > MAX_GOLD_WORDS:
        return f"is a text of more than {MAX_GOLD_WORDS} words"
    return None


def _values(answer: Answer) -> list[Expression]:
    if isinstance(answer, Sequence):
        return [value for item in answer.items for value in _values(item)]
    if isinstance(answer, Region):
        return []
    return [answer.value] if isinstance(answer, Quantity) else []


def _check_defined(value: Expression) -> None:
    if symbols(value) or isinstance(value, Number) or "\\infty" in repr(value):
        return
    try:
        rational(value)
    except NotRationalError:
        approximate(value, 30)
