"""Several verifiers for one task, each with a weight and options: `data.verifier: [{name, weight, options}, ...]`.

A task names them as one text, the JSON of the list, so that a task still has one verifier and equal lists are one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

FORM = "{name: NAME, weight: NUMBER, options: {...}}, of which only name is required"


@dataclass(frozen=True)
class Part:
    """One verifier of several."""

    name: str
    weight: float = 1.0  # of its reward in the sum
    options: Mapping[str, Any] = field(default_factory=dict)  # of a class or function; of the tests of a built-in one


def encode(parts: Sequence[Mapping[str, Any]]) -> str:
    """Return the text by which tasks name these verifiers."""
    return json.dumps(list(parts), sort_keys=True)


def is_combined(verifier: str) -> bool:
    """Whether a task's verifier is several."""
    return verifier.startswith("[")


def parts_of(verifier: str) -> list[Part]:
    """Return the verifiers that a task names; a plain name is one without options."""
    return [Part(**part) for part in json.loads(verifier)] if is_combined(verifier) else [Part(verifier)]


def describe_part_problems(key: str, parts: Any) -> list[str]:
    """Return what is wrong with a list of verifiers."""
    if not isinstance(parts, list) or not parts:
        return [f"{key} must be a list, each {FORM}."]
    problems = []
    for number, part in enumerate(parts):
        where = f"{key}[{number}]"
        if not isinstance(part, dict) or not isinstance(part.get("name"), str):
            problems.append(f"{where} must be {FORM}.")
            continue
        problems += [
            f"{where}.{name} is not known; write {FORM}." for name in part.keys() - {"name", "weight", "options"}
        ]
        weight = part.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) < float("inf"):
            problems.append(f"{where}.weight={weight} must be a finite number.")
        if not isinstance(part.get("options", {}), dict):
            problems.append(f"{where}.options must be a mapping.")
    return problems
