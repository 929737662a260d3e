"""Verifier for tool calls, given as `Action:` and `Action Input:`.

`tests.reading` chooses how calls are read:

- `sdpo` (default) accepts what SDPO's reference accepts: the words behind `Action:`, anywhere in the text, must be the
  expected names in any order, and the union of all objects behind `Action Input:` must be the union of the expected
  inputs. So names may be followed by anything (`find()`), malformed inputs count as `{}`, and inputs may be swapped
  between calls. Deviation: what the strict reading accepts is right too, where the reference fails on nested inputs.
- `strict`: each call is a line `Action: name` with a line `Action Input: {...}` of its own; malformed text has status
  `format`; inputs belong to their call, so swapping them fails; true is not 1.

In both, numbers compare by value, inputs may be nested, and an expected call named `[Optional]name` may be made or
omitted (in the reference it cannot be made). Where no call is expected, a text without calls is right.
"""

import contextlib
import json
import re
from collections import Counter
from typing import Any

from pmd.types import Task, Verdict

ACTION = re.compile(r"^[ \t]*Action:(.*)$", re.MULTILINE)
INPUT = re.compile(r"^[ \t]*Action Input:[ \t\r\n]*", re.MULTILINE)
NAMES_ANYWHERE = re.compile(r"Action:\s*(\w+)")
INPUTS_ANYWHERE = re.compile(r"Action Input:\s*(?={)")
OPTIONAL = "[Optional]"
MAX_CALLS = 200
NO_CALL = "No call was found; write a line `Action: name`, then a line `Action Input: {...}`."


def verify_tool_use(task: Task, completion_text: str) -> Verdict:
    """Compare the calls of the completion with the expected ones."""
    calls = parse_calls(completion_text)
    verdict = _malformed(calls, task.answer) if isinstance(calls, str) else _compare(calls, task.answer)
    if verdict.correct or task.tests.get("reading", "sdpo") == "strict":
        return verdict
    names, inputs = names_and_inputs(completion_text)
    answer = _describe(names, inputs)
    if is_right_by_reference(names, inputs, task.answer):
        return Verdict(1.0, True, "ok", answer=answer)
    return Verdict(0.0, False, "wrong_answer", verdict.feedback, answer) if names else verdict


def _malformed(problem: str, answer: str) -> Verdict:
    needed, _ = expected_calls(answer)
    if problem == NO_CALL and not needed:
        return Verdict(1.0, True, "ok", answer="[]")
    return Verdict(0.0, False, "format", feedback=problem)


def _compare(calls: list[tuple[str, str]], expected: str) -> Verdict:
    needed, optional = expected_calls(expected)
    made = Counter(calls)
    answer = canonical(sorted(calls))
    if not needed - made and not (made - needed) - optional:
        return Verdict(1.0, True, "ok", answer=answer)
    names, wanted = (Counter(name for name, _ in part.elements()) for part in (made, needed))
    right_names = not wanted - names and not (names - wanted) - Counter(name for name, _ in optional.elements())
    feedback = "The actions are right, but not their inputs." if right_names else "The actions are not the right ones."
    return Verdict(0.0, False, "wrong_answer", feedback=feedback, answer=answer)


def _describe(names: list[str], inputs: dict[str, Any]) -> str:
    try:
        return canonical([sorted(names), inputs])
    except RecursionError:
        return canonical(sorted(names))


def names_and_inputs(text: str) -> tuple[list[str], dict[str, Any]]:
    """Return what SDPO's reference reads: the names, and the union of all inputs, each up to its first `}`."""
    inputs: dict[str, Any] = {}
    end = 0
    while (found := INPUTS_ANYWHERE.search(text, end)) and (end := text.find("}", found.end()) + 1):
        with contextlib.suppress(ValueError, RecursionError):
            inputs |= json.loads(text[found.end() : end])
    return NAMES_ANYWHERE.findall(text), inputs


def is_right_by_reference(names: list[str], inputs: dict[str, Any], answer: str) -> bool:
    """Compare as SDPO's reference does; an expected call that is optional counts if it was made."""
    calls = json.loads(answer)
    needed = Counter(call["Action"] for call in calls if not call["Action"].startswith(OPTIONAL))
    surplus = Counter(names) - needed
    wanted: dict[str, Any] = {}
    for call in calls:
        name = call["Action"].removeprefix(OPTIONAL)
        if call["Action"] != name:
            if not surplus[name]:
                continue
            surplus[name] -= 1
        given = call["Action_Input"]
        wanted |= json.loads(given) if isinstance(given, str) else given
    return not needed - Counter(names) and not surplus.total() and inputs == wanted


def parse_calls(text: str) -> list[tuple[str, str]] | str:
    """Return (name, canonical input) of every call, or a sentence about the first malformed one."""
    actions = list(ACTION.finditer(text))
    if not actions:
        return NO_CALL
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
    if isinstance(value, list | tuple):
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
