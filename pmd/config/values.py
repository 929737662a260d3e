"""Converts plain YAML values to typed sections; each value that does not fit becomes an error message.

The dataclasses of `schema.py` define what fits: types in their annotations, bounds in their metadata.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal, Union, get_args, get_origin

from pmd.config.renamed import describe_old_key
from pmd.config.schema import RunConfig

_WRONG = object()
MAX_WIDENED = 2**1000  # above it, a whole number does not fit into a float
MAX_CHARACTERS = 4095  # of a path, and so of any text
MAX_NAME_BYTES = 255  # of one part of a path
MAX_LIST = 1000  # items of a list
_NAMES = {
    Any: "anything",
    type(None): "null",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
}


def build_section(
    section: type, values: Mapping[str, Any], prefix: str = "", extra: Sequence[str] = ()
) -> tuple[Any, list[str]]:
    """Build a section from plain values; a bad value leaves the field at its default and adds a problem.

    Args:
        prefix: the section's path in error messages, with a trailing dot; empty at the top level.
        extra: keys that the caller handles itself; used for suggestions only.
    """
    problems: list[str] = []
    hints = typing.get_type_hints(section)
    fields = {f.name: f for f in dataclasses.fields(section)}
    for key in (name for name in values if name not in fields):
        problems.append(_describe_unknown(str(key), values[key], prefix, [*fields, *extra]))
    kept: dict[str, Any] = {}
    for key in (name for name in fields if name in values):
        hint, value, path = hints[key], values[key], prefix + key
        if dataclasses.is_dataclass(hint):
            if isinstance(value, dict):
                kept[key], nested = build_section(typing.cast(type, hint), value, path + ".")
                problems += nested
            else:
                example = f"{path}.{dataclasses.fields(hint)[0].name}"
                problems.append(f"{path}={shown(value)} must be a section; set a key of it, such as {example}.")
            continue
        converted = convert(value, hint)
        if converted is _WRONG:
            problems.append(f"{path}={shown(value)} must be {describe(hint)}.")
        elif wrong := _value_problems(path, converted, fields[key].metadata):
            problems += wrong
        else:
            kept[key] = converted
    return section(**kept), problems


def convert(value: Any, hint: Any) -> Any:
    """Return `value` as the hinted type, or `_WRONG`. Only an int is widened, to a float; nothing is guessed."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        results = [convert(value, option) for option in get_args(hint)]
        return next((result for result in results if result is not _WRONG), _WRONG)
    if origin is Literal:
        value = "off" if value is False and "off" in get_args(hint) else value  # YAML reads a bare off as false
        return next((option for option in get_args(hint) if option == value and type(option) is type(value)), _WRONG)
    if origin is list:
        items = [convert(item, get_args(hint)[0]) for item in value] if isinstance(value, list) else [_WRONG]
        return _WRONG if any(item is _WRONG for item in items) else items
    if origin is dict:
        pairs = {str(k): convert(v, get_args(hint)[1]) for k, v in value.items()} if isinstance(value, dict) else None
        return _WRONG if pairs is None or any(v is _WRONG for v in pairs.values()) else pairs
    if hint is Any:
        return value
    if hint is type(None):
        return None if value is None else _WRONG
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < MAX_WIDENED else _WRONG
    return value if type(value) is hint else _WRONG


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the hinted type."""
    return convert(value, hint) is not _WRONG


def describe(hint: Any) -> str:
    """Return in words which values a type allows."""
    origin, args = get_origin(hint), list(get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(str(option) for option in args)
    if origin is list:
        return f"a list, each {describe(args[0])}"
    if origin is dict:
        return f"a mapping, each value {describe(args[1])}"
    return _NAMES.get(hint, str(hint))


def shown(value: Any, limit: int = 80) -> str:
    """Return a value as YAML would write it, shortened to fit a message."""
    is_word = value is None or isinstance(value, bool)
    try:
        text = json.dumps(value) if is_word else value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits; a list of lists of lists ...
        return f"({type(value).__name__}, too long to show)"
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _describe_unknown(key: str, value: Any, prefix: str, known: Sequence[str]) -> str:
    """Return what replaced an old key, or a guess at what an unknown key was meant to be."""
    path = prefix + key
    if sentence := describe_old_key(path, shown(value)):
        return sentence
    if close := get_close_matches(key, known, n=1):
        remedy = f"did you mean {prefix}{close[0]}?"
    elif elsewhere := [name for name in all_keys(RunConfig) if name.split(".")[-1] == key]:
        remedy = f"did you mean {' or '.join(elsewhere)}?"
    else:
        remedy = f"known keys: {', '.join(known)}."
    return f"{path}={shown(value)} is not a known key; {remedy}"


def all_keys(section: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every key of a section and of the sections in it."""
    for name, hint in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(hint):
            yield from all_keys(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield prefix + name


def text_problem(text: str) -> str | None:
    """Return what a text breaks of the rules for all texts of a configuration, or None."""
    if not text.strip():
        return "must not be empty"
    if not text.isprintable():  # lone surrogates and NUL are not printable either
        return "must be one line of printable characters"
    if len(text) > MAX_CHARACTERS:
        return f"has {len(text)} characters; it must have at most {MAX_CHARACTERS}"
    if any(len(part.encode()) > MAX_NAME_BYTES for part in text.split("/")):
        return f"has a part of more than {MAX_NAME_BYTES} bytes, which no file can have as its name"
    return None


def _value_problems(path: str, value: Any, bounds: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with a value of the right type, or with the items of a list or a mapping."""
    if isinstance(value, list):
        if len(value) > MAX_LIST:
            return [f"{path} has {len(value)} items; it must have at most {MAX_LIST}."]
        return [problem for item in value for problem in _value_problems(path, item, bounds)]
    if isinstance(value, dict):
        if len(value) > MAX_LIST:
            return [f"{path} has {len(value)} entries; it must have at most {MAX_LIST}."]
        return [problem for key, item in value.items() for problem in _value_problems(f"{path}.{key}", item, bounds)]
    if isinstance(value, str):
        problem = text_problem(value)
        return [f"{path}={shown(value)} {problem}."] if problem else []
    problem = _bound_problem(path, value, bounds)
    return [problem] if problem else []


def _bound_problem(path: str, value: Any, bounds: Mapping[str, Any]) -> str | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if value != value:  # .nan
        return f"{path}={value} must be a number."
    value_text = shown(value)
    if isinstance(value, float) and math.isinf(value):
        return f"{path}={value} must be finite."
    if "minimum" in bounds and value < bounds["minimum"]:
        return f"{path}={value_text} must be at least {bounds['minimum']}."
    if "above" in bounds and value <= bounds["above"]:
        return f"{path}={value_text} must be above {bounds['above']}."
    if "maximum" in bounds and value > bounds["maximum"]:
        return f"{path}={value_text} must be at most {bounds['maximum']}."
    if "below" in bounds and value >= bounds["below"]:
        return f"{path}={value_text} must be below {bounds['below']}."
    return None
