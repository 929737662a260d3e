"""Verifier for tool calls, given as `Action:` and `Action Input:` lines.

The calls must be the expected ones, each with its own inputs, in any order. SDPO compares the multiset of names and the
union of all inputs. Deviations from that reference, which can be fooled:
- an input must be a JSON object: malformed text is status `format`, where the reference reads `{}`;
- inputs belong to their call: swapping them between calls, or hiding a wrong one behind a later call, fails;
- inputs may be nested; nesting too deep to parse is `format`, where the reference fails or crashes;
- an expected call named `[Optional]name` may be made or omitted; in the reference it cannot be made.
Numbers compare by value, and true is not 1.
"""

import json
import re
from collections import Counter
from typing import Any

from pmd.types import Task, Verdict

ACTION = re.compile(r"^[ \t]*Action:(.*)$", re.MULTILINE)
INPUT = re.compile(r"^[ \t]*Action Input:[ \t\r\n]*", re.MULTILINE)
OPTIONAL = "[Optional]"
MAX_CALLS = 200


def verify_tool_use(task: Task, completion_text: str) -> Verdict:
    """Compare the calls of the completion with the expected ones."""
    calls = parse_calls(completion_text)
    if isinstance(calls, str):
        return Verdict(0.0, False, "format", feedback=calls)
    needed, optional = expected_calls(task.answer)
    made = Counter(calls)
    answer = json.dumps(sorted(calls), ensure_ascii=False)
    if not needed - made and not (made - needed) - optional:
        return Verdict(1.0, True, "ok", answer=answer)
    names, wanted = (Counter(name for name, _ in part.elements()) for part in (made, needed))
    right_names = not wanted - names and not (names - wanted) - Counter(name for name, _ in optional.elements())
    feedback = "The actions are right, but not their inputs." if right_names else "The actions are not the right ones."
    return Verdict(0.0, False, "wrong_answer", feedback=feedback, answer=answer)


def parse_calls(text: str) -> list[tuple[str, str]] | str:
    """Return (name, canonical input) of every call, or a sentence about the first malformed one."""
    actions = list(ACTION.finditer(text))
    if not actions:
        return "No call was found; write a line `Action: name`, then a line `Action Input: {...}`."
    if len(actions) > MAX_CALLS:
        return "There are too many calls."
    calls = []
    for action, following in zip(actions, [*actions[1:], None], strict=True):
        part = text[action.end() : following.start() if following else len(text)]
        found = INPUT.search(part)
        name = action[1].strip(" \t\r")
        if not found:
            return f"The call of {name[:80]} has no `Action Input:` line."
        inputs = _read_object(part[found.end() :])
        if inputs is None:
            return f"The input of {name[:80]} is not a JSON object."
        calls.append((name, inputs))
    return calls


def _read_object(text: str) -> str | None:
    try:
        value, _ = json.JSONDecoder(parse_constant=_refuse).raw_decode(text)
        return canonical(value) if isinstance(value, dict) else None
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def canonical(value: Any) -> str:
    """Return the same text for all JSON texts of equal value: keys sorted, 1.0 as 1."""
    return json.dumps(_plain(value), sort_keys=True, ensure_ascii=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def expected_calls(answer: str) -> tuple[Counter[tuple[str, str]], Counter[tuple[str, str]]]:
    """Return the calls that must be made and those that may be made."""
    needed: Counter[tuple[str, str]] = Counter()
    optional: Counter[tuple[str, str]] = Counter()
    for call in json.loads(answer):
        inputs = call["Action_Input"]
        name, text = call["Action"], canonical(json.loads(inputs) if isinstance(inputs, str) else inputs)
        if name.startswith(OPTIONAL):
            optional[name.removeprefix(OPTIONAL), text] += 1
        else:
            needed[name, text] += 1
    return needed, optional
