"""The leak filter: an insight that gives a problem's answer away is quarantined, never retrieved.

The store keeps fingerprints of answers, not answers; the filter compares fingerprints of word windows, also of every
second word, because answers of several parts are stated with a label before each part. Code and long quotations of a
solution give an answer away in other ways.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

SHORT_ANSWER_CHARS = 2  # such an answer (a letter, a digit) occurs by accident: it leaks only where it is announced
TEST_CHARS = 2_000  # of each test that are compared; some tests are megabytes, and no model is shown more of one
COPIED_WORDS = 8  # so many words in a row, as in a solution or a test but not in the problem, are a quotation
_ANNOUNCED = re.compile(r"(?:answer|option|choice|correct|result)\W+(?:(?:is|was|are|be|to|of|one)\W+){0,3}$")


def answer_words(text: str) -> list[str]:
    """Return the words that are compared: letters and digits, case folded."""
    return re.findall(r"\w+", text.casefold())


def fingerprint(words: list[str]) -> str:
    """Return a short hash of a word sequence."""
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def leak_reason(text: str, answer_sha: str, num_words: int, num_chars: int) -> str:
    """Say how the text gives the answer away; empty where it does not."""
    if num_words == 0:
        return ""
    folded = text.casefold()
    matches = list(re.finditer(r"\w+", folded))
    for stride in (1, 2) if num_words > 1 else (1,):
        for start in range(len(matches) - stride * (num_words - 1)):
            window = matches[start : start + stride * (num_words - 1) + 1 : stride]
            if fingerprint([match.group() for match in window]) != answer_sha:
                continue
            if num_chars > SHORT_ANSWER_CHARS or num_words > 1:
                return "states the answer"
            if _ANNOUNCED.search(folded[: window[0].start()]):
                return "announces the answer"
    return ""


def copy_reason(text: str, question: str, solutions: Iterable[str], tests: Iterable[str] = ()) -> str:
    """Say whether the text holds code, or quotes a solution or test at length; empty where it does neither."""
    if "```" in text:
        return "contains code"
    grams = _grams(text) - _grams(question)
    for source, texts in (("a solution", solutions), ("a test", tests)):
        if grams and any(grams & _grams(quoted) for quoted in texts):
            return f"quotes {source}"
    return ""


def test_texts(tests: Mapping[str, Any]) -> list[str]:
    """Return each test case of a problem as one text: what goes in, then what is to come out."""
    return [" ".join(str(value)[:TEST_CHARS] for value in case.values()) for case in tests.get("cases", ())]


def _grams(text: str) -> set[tuple[str, ...]]:
    words = answer_words(text)
    return {tuple(words[start : start + COPIED_WORDS]) for start in range(len(words) - COPIED_WORDS + 1)}
