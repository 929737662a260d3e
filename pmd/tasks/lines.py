"""Reads JSON Lines files, plain or gzip: one dict per line, and one sentence per bad line.

Bad content never raises. A loader collects the sentences of all its files and raises a single `ConfigError`.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: If it is the wrong file, every line may be bad; nobody reads more than a hundred errors.
MAX_SHOWN = 100
#: What a line must hold to have anything that `describe_unusable` finds; most lines are spared its walk.
SUSPECT = re.compile(rb"\\u[dD][89a-fA-F]|NaN")


@dataclass(frozen=True, slots=True)
class Line:
    """One JSON object and its place in a file."""

    path: Path
    number: int  # from 1
    fields: dict[str, Any]

    def problem(self, field: str, rule: str, remedy: str) -> str:
        """Return an error about one field: file, line, field, value, rule, remedy."""
        value = f"{field}={shorten(self.fields[field])}" if field in self.fields else f"{field} is missing"
        return f"{self.path}:{self.number}: {value}: {rule}; {remedy}."


def shorten(value: Any, limit: int = 80) -> str:
    """Return the value as JSON, cut to a length that fits a message."""
    text = json.dumps(value, ensure_ascii=False, default=repr).encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def read_lines(path: Path) -> tuple[list[Line], list[str]]:
    """Return every line that holds a JSON object, and one sentence for every other line. Blank lines are skipped."""
    entries = list(iterate_lines(path))
    return [e for e in entries if isinstance(e, Line)], [e for e in entries if isinstance(e, str)]


def iterate_lines(path: Path, judged: str = "") -> Iterator[Line | str]:
    """Yield the lines one by one, each bad one as a sentence.

    Args:
        judged: a field that a verifier judges, whatever it holds.
    """
    found = False
    try:
        for number, raw in enumerate(_raw_lines(path), start=1):
            if raw.strip():
                found = True
                yield _parse(path, number, raw, judged)
    except (OSError, EOFError, zlib.error) as error:
        yield f"{path}: cannot be read ({error}); give a readable JSON Lines file, plain or gzip."
    else:
        if not found:
            yield f"{path}: is empty; at least one line is needed."


def _parse(path: Path, number: int, raw: bytes, judged: str) -> Line | str:
    try:
        value = json.loads(
            raw.decode("utf-8-sig" if number == 1 else "utf-8")
        )  # a byte order mark at the start is allowed
    except (ValueError, RecursionError) as error:
        return f"{path}:{number}: not valid JSON ({error}); write one JSON object per line."
    if not isinstance(value, dict):
        return f"{path}:{number}: {shorten(value)} is not a JSON object; write {{...}} on each line."
    stored = {field: part for field, part in value.items() if field != judged}
    if SUSPECT.search(raw) and (problem := describe_unusable(stored)):
        return f"{path}:{number}: {problem}."
    return Line(path, number, value)


def describe_unusable(value: Any) -> str | None:
    """Return which parts of a JSON value nothing can be done with, and why; None if all is well.

    Half a character (an escape such as \\ud83d without its other half) cannot be encoded, neither for a tokenizer nor
    for a file. NaN equals nothing, not even itself.
    """
    halves, not_numbers, waiting = list[str](), list[str](), [("", value)]
    while waiting:
        place, part = waiting.pop()
        if isinstance(part, dict):
            names = [(str(key).encode("utf-8", "backslashreplace").decode(), item) for key, item in part.items()]
            waiting += [(f"{place}.{name}" if place else name, item) for name, item in names]
            halves += [f"{place or 'the line'} has a key that" for key in part if is_half(str(key))]
        elif isinstance(part, list):
            waiting += [(f"{place}[{number}]", item) for number, item in enumerate(part)]
        elif isinstance(part, str) and is_half(part):
            halves.append(f"{place}={shorten(part)}")
        elif isinstance(part, float) and part != part:
            not_numbers.append(place)
    sentences = []
    if halves:
        sentences.append(f"{', '.join(sorted(halves)[:5])} holds half a character (a lone surrogate), which cannot be "
                         "encoded; write whole characters")  # fmt: skip
    if not_numbers:
        sentences.append(f"{', '.join(sorted(not_numbers)[:5])}=NaN can never be reached: NaN equals nothing; write a "
                         "number or a text")  # fmt: skip
    return "; ".join(sentences) or None


def is_half(text: str) -> bool:
    """Whether a text holds a lone surrogate, so that no encoding can write it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _raw_lines(path: Path) -> Iterator[bytes]:
    if path.suffix == ".gz":
        with gzip.open(path, "rb") as packed:
            yield from packed
    else:
        with path.open("rb") as plain:
            yield from plain


def cap_problems(problems: Sequence[str]) -> list[str]:
    """Return the problems; if there are more than a hundred, the first hundred and the number left out."""
    left_out = len(problems) - MAX_SHOWN
    return list(problems) if left_out <= 0 else [*problems[:MAX_SHOWN], f"... and {left_out} more."]
