"""Verifier for programs: runs the completion's code block on every test; reward 1.0 only if all of them pass.

`tests.scorer` selects which block is the program. `lcb` (LiveCodeBench, the default): the block between the last two
fence lines. `sdpo`: the longest closed block. Both compare as LiveCodeBench does: outputs line by line, ignoring
leading and trailing white space of lines and text, where lines also match if their numbers are equal; returned values
with Python's `==`.

Deviations, all of them stricter: digits and white space must be ASCII; a returned value must be JSON (at the top level
a tuple counts as a list, as upstream); an object that claims to equal everything equals nothing. Every test runs in a
fresh process. Feedback follows SDPO and therefore quotes tests, including expected outputs.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from pmd.tasks.code_tests import DEFAULT_MEMORY_MB, DEFAULT_TIME_LIMIT_S
from pmd.types import CaseCounts, Task, Verdict, VerdictStatus
from pmd.verifiers.sandbox.pool import Level, Limits, Outcome, Sandbox

BLANKS = " \t\r\n\v\f"
#: No two parts can match the same digits, so matching takes linear time even on a million of them.
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
CLOSED_BLOCK = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
MIN_OUTPUT_BYTES = 1 << 20
#: A correct output may be this many times longer than the expected one: `3.0000000` for `3`.
MAX_OUTPUT_RATIO = 4
MAX_EXCERPT, MAX_FEEDBACK = 450, 2000
NO_BLOCK = "The completion contains no closed code block; put the whole program between ```python and ```."

log = logging.getLogger(__name__)
_lock = threading.Lock()
_sandboxes: dict[int, Sandbox] = {}
_level: list[Level | None] = [None]


@dataclass(frozen=True, slots=True)
class TestResult:
    """One test of one program."""

    case: Mapping[str, Any]
    status: VerdictStatus
    output: str  # the beginning of what the program printed or returned
    error: str  # the end of what it wrote to stderr


def choose_sandbox_level(level: Level | None) -> None:
    """Set the level of sandboxes created from now on; None picks the strongest safe one."""
    close_sandbox()
    with _lock:
        _level[0] = level


def close_sandbox() -> None:
    """Close this process's sandbox. Runs in progress end as `sandbox_error`; the next run creates a new sandbox."""
    with _lock:
        open_ones = list(_sandboxes.values())
        _sandboxes.clear()
    for one in open_ones:
        one.close()


def sandbox() -> Sandbox:
    """Return this process's sandbox, created on first use."""
    with _lock:
        if os.getpid() not in _sandboxes:
            _sandboxes.clear()  # after a fork: the workers belong to the parent
            _sandboxes[os.getpid()] = Sandbox(level=_level[0])
        return _sandboxes[os.getpid()]


def verify_code(task: Task, completion_text: str) -> Verdict:
    """Run the program on its tests. After a failure the remaining tests only inform feedback, in limited time."""
    program = extract_program(completion_text, task.tests.get("scorer", "lcb"))
    if program is None:
        return Verdict(0.0, False, "format", feedback=NO_BLOCK, tests=count_tests(task.tests, []))
    results: list[TestResult] = []
    spare_s = float(task.tests.get("time_limit_s", DEFAULT_TIME_LIMIT_S))
    for case in task.tests["cases"]:
        started = time.monotonic()
        results.append(run_test(program, task.tests, case))
        has_failed = any(result.status != "ok" for result in results)
        spare_s -= has_failed * (time.monotonic() - started)
        if spare_s <= 0 or results[-1].status in ("timeout", "memory", "output_limit", "sandbox_error"):
            break
    failed = [result for result in results if result.status != "ok"]
    counts = count_tests(task.tests, results)
    if not failed:
        return Verdict(1.0, True, "ok", tests=counts)
    if failed[-1].status == "sandbox_error":
        log.error("the sandbox failed on task %s: %s", task.task_id, failed[-1].error)
        return Verdict(0.0, False, "sandbox_error")
    num_not_run = len(task.tests["cases"]) - len(results)
    unrun = f"; {num_not_run} more were not run" if num_not_run else ""
    heading = f"Passed {len(results) - len(failed)} of {len(results)} tests{unrun}."
    return Verdict(0.0, False, failed[0].status, feedback=describe_failure(failed, heading), tests=counts)


def count_tests(tests: Mapping[str, Any], results: list[TestResult]) -> CaseCounts:
    """Count passed tests; the first `num_public` tests are public, and `results` start with the first test."""
    passed, num_public = [result.status == "ok" for result in results], int(tests.get("num_public", 0))
    return CaseCounts(len(tests["cases"]), sum(passed), num_public, sum(passed[:num_public]))


def extract_program(completion_text: str, scorer: str) -> str | None:
    """Return the program, or None if there is no closed block."""
    if scorer == "sdpo":
        return max(CLOSED_BLOCK.findall(completion_text), key=len, default=None)
    lines = completion_text.split("\n")
    fences = [number for number, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) >= 2 else None


def run_test(program: str, tests: Mapping[str, Any], case: Mapping[str, Any]) -> TestResult:
    """Run one test in the sandbox, then judge its output here, outside."""
    functional = tests["kind"] == "functional"
    payload = json.dumps(case["args"]) if functional else case["input"]
    expected = json.dumps(case["expected"]) if functional else case["output"]
    limits = Limits(
        time_s=float(tests.get("time_limit_s", DEFAULT_TIME_LIMIT_S)),
        memory_mb=int(tests.get("memory_mb", DEFAULT_MEMORY_MB)),
        output_bytes=MIN_OUTPUT_BYTES + MAX_OUTPUT_RATIO * len(expected.encode(errors="replace")),
    )
    entry = tests["entry"] if functional else ""
    outcome = sandbox().run(program, payload.encode(errors="replace"), limits, entry)
    printed = (outcome.result if functional else outcome.stdout).decode(errors="surrogateescape")
    status = judge(outcome, printed, case, functional=functional)
    error = outcome.stderr.decode(errors="replace")
    # Only an excerpt: a correct answer may be followed by a million spaces in each of a thousand tests.
    return TestResult(case, status, printed.strip()[:MAX_EXCERPT], error.strip()[-MAX_EXCERPT:])


def judge(outcome: Outcome, printed: str, case: Mapping[str, Any], *, functional: bool) -> VerdictStatus:
    """Return the status of one test."""
    if outcome.end != "finished":
        return outcome.end
    if not functional:
        return "ok" if same_output(printed, case["output"]) else "wrong_answer"
    if not outcome.result:
        return "runtime_error"  # it exited without returning
    return "ok" if same_value(printed, case["expected"]) else "wrong_answer"


def same_output(printed: str, expected: str) -> bool:
    """Compare line by line; both must have the same number of lines."""
    ours = [line.strip(BLANKS) for line in printed.strip(BLANKS).split("\n")]
    theirs = [line.strip(BLANKS) for line in expected.strip(BLANKS).split("\n")]
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(ours: str, theirs: str) -> bool:
    if ours == theirs:
        return True
    left, right = re.split(f"[{BLANKS}]+", ours), re.split(f"[{BLANKS}]+", theirs)
    return len(left) == len(right) and all(map(_same_number, left, right))


def _same_number(ours: str, theirs: str) -> bool:
    if not (NUMBER.fullmatch(ours) and NUMBER.fullmatch(theirs)):
        return False
    try:
        return Decimal(ours) == Decimal(theirs)
    except InvalidOperation:  # the exponent is out of range
        return False


def same_value(returned: str, expected: Any) -> bool:
    """Compare a returned value with the expected one; unreadable JSON equals nothing."""
    try:
        return bool(json.loads(returned) == expected)
    except (ValueError, RecursionError):  # not JSON, too many digits, nested too deeply
        return False


def describe_failure(failed: list[TestResult], heading: str) -> str:
    """Describe the first runtime error, else the first limit exceeded, else the two shortest wrong answers."""
    parts = [heading]
    limits = {"timeout": "Time limit exceeded", "memory": "Memory limit exceeded", "output_limit": "Too much output"}
    crashed = next((result for result in failed if result.status == "runtime_error"), None)
    limited = next((result for result in failed if result.status in limits), None)
    if crashed:
        error = crashed.error or "The program ended without a result."
        parts += [f"Runtime error on this input:\n{_cut(_input_of(crashed.case))}", error]
    elif limited:
        parts.append(f"{limits[limited.status]} on this input:\n{_cut(_input_of(limited.case))}")
    else:
        shortest = sorted(failed, key=lambda result: len(_input_of(result.case)) + len(_expected_of(result.case)))
        for result in shortest[:2]:
            texts = _input_of(result.case), result.output, _expected_of(result.case)
            shown = "Input:\n{}\nOutput:\n{}\nExpected:\n{}".format(*map(_cut, texts))
            parts.append(f"Wrong answer.\n{shown}")
    text = "\n\n".join(parts)
    return text.encode(errors="replace").decode()[:MAX_FEEDBACK]


def _input_of(case: Mapping[str, Any]) -> str:
    return case["input"] if "input" in case else json.dumps(case["args"], ensure_ascii=False)


def _expected_of(case: Mapping[str, Any]) -> str:
    return case["output"] if "output" in case else json.dumps(case["expected"], ensure_ascii=False)


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= MAX_EXCERPT // 2 else f"{text[: MAX_EXCERPT // 2 - 3]}..."
