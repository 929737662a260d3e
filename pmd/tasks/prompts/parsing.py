"""What a chat model wrote, read as items of memory. Nothing that a model can write raises; the cost is bounded.

Enters: raw text. Leaves: at most `MAX_ITEMS` items, each on one printable line; what is malformed is left out, and one
malformed item does not cost the others. Looked for in this order: JSON objects in the last fence, JSON objects anywhere
(arrays that break off keep their whole members), `title:` and `content:` headings.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

from pmd.types import InsightAction, ItemKind

KINDS: tuple[ItemKind, ...] = ("strategy", "lesson", "contrast")
ACTIONS: tuple[InsightAction, ...] = ("add", "keep", "edit", "retire")
MAX_ITEMS = 3  # of one output
MAX_ITEM_CHARACTERS = 1200  # an item longer than this is a transcript, not an insight
MAX_CHARACTERS = 40_000  # of an output that are looked at, counted from its end
MAX_FAILURES = 200  # opening braces tried in vain
THINKING = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)
HEADING = re.compile(r"^[\W_]*(action|kind|title|content|insight)\b[\W_]*?:[\W_]*(.*)$", re.IGNORECASE | re.MULTILINE)


class ParsedInsight(NamedTuple):
    """One change to a problem's insights, as a reflection asks for it."""

    kind: ItemKind
    text: str
    action: InsightAction = "add"
    number: int | None = None  # of the insight in the prompt's list, counted from 1


class Reply(NamedTuple):
    """What one output of the model holds."""

    items: list[ParsedInsight]
    num_rejected: int = 0  # what began as an item and is none, and items beyond `MAX_ITEMS`


def parse_items(text: str) -> Reply:
    """Return the well-formed items of a reflection, at most `MAX_ITEMS`, and how many others were left out."""
    objects, num_broken = _objects(text)
    found = [item for each in objects if (item := _reflected(each)) is not None]
    return Reply(found[:MAX_ITEMS], num_broken + len(objects) - len(found[:MAX_ITEMS]))


def parse_line(text: str) -> str | None:
    """Return `title: content` of the first well-formed item; None where there is none."""
    return next((line for item in _objects(text)[0] if (line := _line(item))), None)


def strip_thinking(text: str) -> str:
    """Remove <think> blocks, closed or not, also one that the prompt opened, and surrounding white space."""
    return THINKING.sub("", text).rpartition("</think>")[2].strip()


def _reflected(item: dict[str, Any]) -> ParsedInsight | None:
    action, kind, number = _word(item.get("action", "add")), _word(item.get("kind")), _number(item.get("insight"))
    if action not in ACTIONS or (action != "add" and number is None):
        return None
    if action in ("keep", "retire"):
        return ParsedInsight("strategy", "", cast(InsightAction, action), number)
    line = _line(item)
    if line is None or (action == "add" and kind not in KINDS):
        return None
    kept = cast(ItemKind, kind if kind in KINDS else "strategy")
    return ParsedInsight(kept, line, cast(InsightAction, action), number if action == "edit" else None)


def _number(value: object) -> int | None:
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value) < 9:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _word(value: object) -> str:
    return value.strip().casefold() if isinstance(value, str) else ""


def _line(item: dict[str, Any]) -> str | None:
    """Return `title: content` on one line, None where either is missing or overlong."""
    title, content = item.get("title"), item.get("content")
    if not (isinstance(title, str) and isinstance(content, str)):
        return None
    title, content = _printable(title), _printable(content)
    line = f"{title}: {content}"
    return line if title and content and len(line) <= MAX_ITEM_CHARACTERS else None


def _printable(text: str) -> str:
    """Return one line without control characters and halves of characters, which no store or tokenizer takes."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _objects(text: str) -> tuple[list[dict[str, Any]], int]:
    """Return what the output holds, by the first way of reading that finds anything, and 1 if some is unreadable."""
    shown = strip_thinking(text[-MAX_CHARACTERS:].rsplit("</think>", 1)[-1])
    fences = FENCE.findall(shown)
    broken = 0
    for source in (*fences[-1:], shown):
        objects, broken = _json_objects(source)
        if objects:
            return objects, broken
    return _headed(shown), broken


def _json_objects(source: str) -> tuple[list[dict[str, Any]], int]:
    """Return the objects, and 1 if an opening brace led to none: what follows it cannot be counted."""
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


def _headed(source: str) -> list[dict[str, Any]]:
    """Read `Kind: ...`, `Title: ...`, `Content: ...` lines; a heading that recurs begins the next item."""
    items: list[dict[str, Any]] = []
    headings: Sequence[tuple[str, str]] = HEADING.findall(source)
    for name, value in headings:
        key: Literal["action", "kind", "title", "content", "insight"] = name.casefold()
        if not items or key in items[-1]:
            items.append({})
        items[-1][key] = value.strip(" *_\"'`,")
    return items
