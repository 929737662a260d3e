"""Parses a chat model's reflection into memory items. It never raises, and its cost is bounded.

It returns at most `MAX_ITEMS` items, each on one printable line, and drops malformed ones without affecting the others.
It looks for, in this order: JSON objects in the last fence, JSON objects anywhere (a truncated array still yields its
complete members), and `title:` and `content:` headings.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

from pmd.tasks.thinking import strip_thinking
from pmd.types import INSIGHT_KINDS, InsightAction, ItemKind

ACTIONS: tuple[InsightAction, ...] = ("add", "keep", "edit", "retire")
MAX_ITEMS = 3  # per output
MAX_ITEM_CHARACTERS = 1200  # an item longer than this is a transcript, not an insight
MAX_CHARACTERS = 40_000  # only the end of a longer output is parsed
MAX_FAILURES = 200  # opening braces that may fail to parse
FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)
HEADING = re.compile(r"^[\W_]*(action|kind|title|content|insight)\b[\W_]*?:[\W_]*(.*)$", re.IGNORECASE | re.MULTILINE)


class ParsedInsight(NamedTuple):
    """One change to a task's insights that a reflection asks for."""

    kind: ItemKind
    text: str
    action: InsightAction = "add"
    number: int | None = None  # of the insight in the prompt's list, from 1


class Reply(NamedTuple):
    """What was parsed from one output of the model."""

    items: list[ParsedInsight]
    num_rejected: int = 0  # malformed items, and items beyond `MAX_ITEMS`


def parse_items(text: str) -> Reply:
    """Return the well-formed items of a reflection, at most `MAX_ITEMS`, and how many others were dropped."""
    objects, num_broken = _objects(text)
    found = [item for each in objects if (item := _reflected(each)) is not None]
    return Reply(found[:MAX_ITEMS], num_broken + len(objects) - len(found[:MAX_ITEMS]))


def parse_line(text: str) -> str | None:
    """Return `title: content` of the first well-formed item, or None."""
    return next((line for item in _objects(text)[0] if (line := _line(item))), None)


def _reflected(item: dict[str, Any]) -> ParsedInsight | None:
    action, kind, number = _word(item.get("action", "add")), _word(item.get("kind")), _number(item.get("insight"))
    if action not in ACTIONS or (action != "add" and number is None):
        return None
    if action in ("keep", "retire"):
        return ParsedInsight("strategy", "", cast(InsightAction, action), number)
    line = _line(item)
    if line is None or (action == "add" and kind not in INSIGHT_KINDS):
        return None
    kept = cast(ItemKind, kind if kind in INSIGHT_KINDS else "strategy")
    return ParsedInsight(kept, line, cast(InsightAction, action), number if action == "edit" else None)


def _number(value: object) -> int | None:
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value) < 9:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _word(value: object) -> str:
    return value.strip().casefold() if isinstance(value, str) else ""


def _line(item: dict[str, Any]) -> str | None:
    """Return `title: content` on one line, or None if either is missing or the line is too long."""
    title, content = item.get("title"), item.get("content")
    if not (isinstance(title, str) and isinstance(content, str)):
        return None
    title, content = printable_line(title), printable_line(content)
    line = f"{title}: {content}"
    return line if title and content and len(line) <= MAX_ITEM_CHARACTERS else None


def printable_line(text: str) -> str:
    """Return one line without control characters and lone surrogates, which stores and tokenizers reject."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _objects(text: str) -> tuple[list[dict[str, Any]], int]:
    """Return the objects found by the first method that finds any, and 1 if some text was unreadable."""
    shown = strip_thinking(text[-MAX_CHARACTERS:])
    fences = FENCE.findall(shown)
    broken = 0
    for source in (*fences[-1:], shown):
        objects, broken = _json_objects(source)
        if objects:
            return objects, broken
    return _parse_headings(shown), broken


def _json_objects(source: str) -> tuple[list[dict[str, Any]], int]:
    """Return the objects, and 1 if any opening brace failed to parse; such failures cannot be counted reliably."""
    decoder, start, failures = json.JSONDecoder(), 0, 0
    found: list[object] = []
    while (start := source.find("{", start)) >= 0 and failures < MAX_FAILURES:
        try:
            value, end = decoder.raw_decode(source, start)
        except (ValueError, RecursionError):  # an integer of thousands of digits is a ValueError
            start, failures = start + 1, failures + 1
            continue
        found.append(value)
        start = end
    return [cast(dict[str, Any], value) for value in found if isinstance(value, dict)], min(failures, 1)


def _parse_headings(source: str) -> list[dict[str, Any]]:
    """Parse `Kind: ...`, `Title: ...`, `Content: ...` lines; a repeated heading starts the next item."""
    items: list[dict[str, Any]] = []
    headings: Sequence[tuple[str, str]] = HEADING.findall(source)
    for name, value in headings:
        key: Literal["action", "kind", "title", "content", "insight"] = name.casefold()
        if not items or key in items[-1]:
            items.append({})
        items[-1][key] = value.strip(" *_\"'`,")
    return items
