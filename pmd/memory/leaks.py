"""The leak filter: an insight that gives a problem's answer away is quarantined, never retrieved.

The store keeps fingerprints of answers, not answers; the filter compares fingerprints of word windows.
"""

import hashlib
import re

SHORT_ANSWER_CHARS = 2  # such an answer (a letter, a digit) occurs by accident: it leaks only where it is announced
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
    for start in range(len(matches) - num_words + 1):
        window = matches[start : start + num_words]
        if fingerprint([match.group() for match in window]) != answer_sha:
            continue
        if num_chars > SHORT_ANSWER_CHARS:
            return "states the answer"
        if _ANNOUNCED.search(folded[: window[0].start()]):
            return "announces the answer"
    return ""
