# ruff: noqa: RUF001
"""Finds the final answer in the text of a completion.

In this order: the last box; a text that is an answer as a whole; what follows the last "answer is" or "answer:"; the
last formula or number. Several boxes are one answer if nothing but `and`, `or` and punctuation separates them; words
such as "no, wait" make the last one count. A percent sign, a base, a degree sign or a unit right behind a box belongs
to it. A box that never closes is no answer: the completion was cut off in it.
"""

import re

from pmd.verifiers.mathematics.answers import Words, read_answer
from pmd.verifiers.mathematics.expressions import UnreadableError
from pmd.verifiers.mathematics.normalize import normalize
from pmd.verifiers.mathematics.units import BARE, read_unit

MAX_WHOLE = 1000  # characters of a text that may be an answer as a whole
MAX_BOXES = 20  # the last ones are looked at
MAX_APART = 70  # characters between boxes that form one answer
BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\boxed\s+(?=\w)")
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
BEHIND = re.compile(
    r"\s*\$?\s*(\\?%|_\{?\d+\}?|\^\{?\\circ\}?|\\degree|°|(?:\\[,;: ~]|~)*\\(?:text|mathrm)\{[^{}]*\}(?:\^\{?\d\}?)?)"
)
CUE = re.compile(r"(?:answer|result|solution)\s*(?:is|:|=|\*\*:?|:\*\*)+\s*:?|####", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?](?=\s|\*|$)|\n")
#: Words right before a number that make it another answer.
QUALIFIER = re.compile(
    r"(?:at (?:least|most)|(?:more|less|fewer|greater|larger|smaller) than|not|no|over|under|above|below|between|from)"
    r" (?:equal to )?$",
    re.IGNORECASE,
)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
ATOM = r"(?:√?\(?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?\)?(?:π|i(?![A-Za-z])|!|\\?%|°)?|π)"
NUMBER = re.compile(
    rf"(?<![\w.])[$€£]?[-−+]?{ATOM}(?:(?: ?(?:\*\*|[-+*/^×·÷−]) ?[-−]?|√){ATOM}| \d+/\d+)*"
    rf"(?: ?(?:[A-Za-z]+/[A-Za-z]+|{'|'.join(sorted(BARE, key=len, reverse=True))})(?![A-Za-z])(?:\^?[23²³])?)?"
)


def final_answer(text: str, *, is_tagged: bool = False) -> str | None:
    """Return the text of the final answer, or None if the completion has none.

    Args:
        is_tagged: whether the text stood in `<answer>`, so that words may be the answer.
    """
    if BOX.search(text):
        return _boxed(text)
    is_short = len(text) <= MAX_WHOLE and "\n" not in text.strip() and not FORMULA.search(text)
    if is_short and _is_read(text):
        return text
    cues = list(CUE.finditer(text))
    if cues and (found := _behind_cue(text[cues[-1].end() :])):
        return found
    if is_short and is_tagged:
        return text
    return _last_formula(text) or (text if is_short and text.strip() else None)


def _is_read(text: str) -> bool:
    found = read_answer(text)
    return bool(found) and not any(isinstance(one, Words) for one in found)


def _boxed(text: str) -> str | None:
    boxes: list[tuple[int, str | None, int]] = []
    for found in list(BOX.finditer(text))[-MAX_BOXES:]:
        if not boxes or found.start() >= boxes[-1][2]:  # else it is a part of the one before
            boxes.append((found.start(), *_box_content(text, found.end())))
    if not boxes or boxes[-1][1] is None:
        return None
    start, content, end = boxes[-1]
    assert content is not None
    parts, joint = [_with_suffix(content, text[end : end + 200])], ", "
    for earlier_start, earlier, earlier_end in reversed(boxes[:-1]):
        between = text[earlier_end:start]
        words = {word.lower() for word in WORD.findall(between)}
        if earlier is None or len(between) > MAX_APART or words - {"and", "or", "quad", "qquad", "text"}:
            break
        joint = " or " if "or" in words else joint
        if earlier != parts[0]:
            parts.insert(0, earlier)
        start = earlier_start
    return joint.join(parts)


def _box_content(text: str, at: int) -> tuple[str | None, int]:
    """Return the content of the box whose brace opens at `at`, and where it ends; None if it never closes."""
    if text[at] != "{":
        found = re.match(r"[^\s$\\.,]+", text[at:])
        return (found[0], at + found.end()) if found else (None, at)
    depth = 0
    for place in re.finditer(r"\\[{}]|[{}]", text[at:]):
        depth += (place[0] == "{") - (place[0] == "}")
        if depth == 0:
            return _inner(text[at + 1 : at + place.start()]), at + place.end()
    return None, len(text)


def _inner(content: str) -> str:
    """Return what a box inside a box holds."""
    found = BOX.match(content.strip())
    if not found:
        return content
    inside, end = _box_content(content.strip(), found.end())
    return inside if inside is not None and not content.strip()[end:].strip() else content


def _with_suffix(content: str, behind: str) -> str:
    found = BEHIND.match(behind)
    if not found:
        return content
    if "\\text" in found[1] or "\\mathrm" in found[1]:
        try:
            read_unit(normalize(found[1]))
        except UnreadableError:
            return content
    return f"{content} {found[1]}" if found[1][0] not in "_^" else f"{content}{found[1]}"


def _behind_cue(text: str) -> str | None:
    line = next((one for one in text.strip().split("\n") if one.strip(" *:")), "")
    sentence = SENTENCE_END.split(line, maxsplit=1)[0].strip(" *:") if not FORMULA.search(line) else _sentence(line)
    if not sentence:
        return None
    return sentence if _is_read(sentence) else _last_formula(sentence) or sentence


def _sentence(line: str) -> str:
    """Return the line up to its first full stop outside formulas."""
    places = [found.span() for found in FORMULA.finditer(line)]
    for found in SENTENCE_END.finditer(line):
        if not any(start <= found.start() < end for start, end in places):
            return line[: found.start()].strip(" *:")
    return line.strip(" *:")


def _last_formula(text: str) -> str | None:
    """Return the last formula that can be read, or the last number if it comes later."""
    formulas = [(found.end(), next(filter(None, found.groups()))) for found in FORMULA.finditer(text)]
    formula = next(((end, inside) for end, inside in reversed(formulas) if _is_read(inside)), (-1, None))
    outside = FORMULA.sub(lambda found: " " * len(found[0]), text)
    number = max(NUMBER.finditer(outside), key=lambda found: found.end(), default=None)
    if number is not None and number.end() > formula[0]:
        qualifier = QUALIFIER.search(outside[: number.start()])
        return (qualifier[0] if qualifier else "") + number[0].rstrip(",.")
    return formula[1]
