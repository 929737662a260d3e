"""The format of a programming task's `tests`, and its check.

`{"kind": "stdin", "cases": [{"input", "output"}], "time_limit_s", "memory_mb"}` or
`{"kind": "functional", "entry", "cases": [{"args", "expected"}], ...}`; `scorer` is `lcb` (default) or `sdpo`;
the first `num_public` cases (default 0) are public: best-of-n selects by them and is scored on the rest.
"""

import keyword
import sys
from collections.abc import Mapping
from typing import Any

DEFAULT_TIME_LIMIT_S = 6.0
DEFAULT_MEMORY_MB = 512
#: Integers may have this many digits in tests, programs and their results, as in LiveCodeBench's grader; Python stops
#: at 4,300. The limit of this process is raised here, unless it is already higher, or switched off (0).
MAX_INT_DIGITS = 50_000
if 0 < sys.get_int_max_str_digits() < MAX_INT_DIGITS:
    sys.set_int_max_str_digits(MAX_INT_DIGITS)
MAX_TIME_S, MIN_MEMORY_MB, MAX_MEMORY_MB = 600.0, 32, 65536


def check_tests(tests: Mapping[str, Any] | None) -> list[str]:
    """Return the rules that `tests` breaks; if the list is empty, the tests can be run."""
    if not tests:
        return ["must hold kind and cases"]
    problems = []
    kind, cases = tests.get("kind"), tests.get("cases")
    if kind not in ("stdin", "functional"):
        problems.append("kind must be stdin or functional")
    if kind == "functional" and not _is_name(tests.get("entry")):
        problems.append("entry must name a function")
    if not isinstance(cases, list) or not cases:
        problems.append("cases must be a non-empty list")
    elif kind in ("stdin", "functional"):
        bad = [number for number, case in enumerate(cases) if not _case_fits(kind, case)]
        form = "{input: text, output: text}" if kind == "stdin" else "{args: list, expected: value}"
        problems += [f"cases[{number}] must be {form}" for number in bad[:5]]
        num_public = tests.get("num_public", 0)
        if type(num_public) is not int or not 0 <= num_public <= len(cases):
            problems.append(f"num_public must be a whole number from 0 to {len(cases)}")
    problems += _check_limits(tests)
    if tests.get("scorer", "lcb") not in ("lcb", "sdpo"):
        problems.append("scorer must be lcb or sdpo")
    return problems


def _case_fits(kind: str, case: Any) -> bool:
    if not isinstance(case, dict):
        return False
    if kind == "stdin":
        return isinstance(case.get("input"), str) and isinstance(case.get("output"), str)
    return isinstance(case.get("args"), list) and "expected" in case


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier() and not keyword.iskeyword(value)


def _check_limits(tests: Mapping[str, Any]) -> list[str]:
    time_limit_s, memory_mb = tests.get("time_limit_s", 1), tests.get("memory_mb", DEFAULT_MEMORY_MB)
    problems = []
    if not _is_number(time_limit_s) or not 0 < time_limit_s <= MAX_TIME_S:
        problems.append(f"time_limit_s must be above 0 and at most {MAX_TIME_S:.0f}")
    if not _is_number(memory_mb) or not MIN_MEMORY_MB <= memory_mb <= MAX_MEMORY_MB:
        problems.append(f"memory_mb must lie between {MIN_MEMORY_MB} and {MAX_MEMORY_MB}")
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
