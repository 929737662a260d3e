"""The verifier for programs: comparison of outputs and values, extraction, feedback."""

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmd.config.schema import DataConfig
from pmd.tasks.jsonl import read_task_file
from pmd.types import Message, Task
from pmd.verifiers.code import MAX_EXCERPT, extract_program, run_test, same_output, same_value
from pmd.verifiers.pool import verify


def task(cases, **tests):
    kind = {"kind": "stdin"} if "input" in cases[0] else {"kind": "functional", "entry": "f"}
    return Task(
        "t", (Message("user", "p"),), "code", "test", tests={**kind, "cases": cases, "time_limit_s": 5, **tests}
    )


CODE = {"kind": "stdin", "time_limit_s": 5}


def fence(program):
    return f"```python\n{program}\n```"


def official_output(printed, expected):
    """LiveCodeBench's rule for stdin problems, written from its description."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (printed, expected))
    if len(ours) != len(theirs):
        return False
    for left, right in zip(ours, theirs, strict=True):
        if left == right:
            continue
        try:
            if [Decimal(word) for word in left.split()] != [Decimal(word) for word in right.split()]:
                return False
        except ArithmeticError:
            return False
    return True


WORDS = st.sampled_from(
    ["1", "1.0", "01", "-0", "0", "+1", "1e0", ".5", "0.50", "a", "A", " ", "\n", "\t", "\r\n", "  ", "3."]
)
TEXTS = st.lists(WORDS, max_size=8).map("".join)


@given(TEXTS, TEXTS)
def test_ascii_outputs_compare_as_upstream(printed, expected):
    assert same_output(printed, expected) == official_output(printed, expected)


@pytest.mark.parametrize(
    "printed", ["1_0", "\uff11\uff10", "10\u00a0", "\u066110", "NaN", "0x0a", "1e99999999999999999999"]
)
def test_outputs_that_only_look_right_are_wrong(printed):
    assert not same_output(printed, "10")


@pytest.mark.parametrize(
    ("returned", "expected", "same"),
    [
        ("3", 3, True), ("3.0", 3, True), ("true", 1, True), ('"3"', 3, False), ("[1, 2]", [1, 2], True),
        ("NaN", float("nan"), False), ("[" * 100_000, [], False), ("9" * 10_000, 9, False), ("", None, False),
        ("null", None, True), ('{"a": 1}', {"a": 1}, True), ("3 3", 3, False),
    ],
)  # fmt: skip
def test_returned_values(returned, expected, same):
    assert same_value(returned, expected) == same


@pytest.mark.parametrize(
    ("text", "lcb", "sdpo"),
    [
        ("```python\na\n```", "a", "a"),
        ("```python\nlonger\n```\nthen\n```python\nb\n```", "b", "longer"),
        ("```\na\n```", "a", "a"),
        ("```python\na", None, None),
        ("a", None, None),
        ("", None, None),
        ("```python\na\n```\n```python\nunclosed", "", "a"),  # upstream takes what is between the last two fences
    ],
)
def test_extraction(text, lcb, sdpo):
    assert extract_program(text, "lcb") == lcb
    found = extract_program(text, "sdpo")
    assert (found.strip() if found else found) == sdpo


CASES = [{"input": str(n), "output": str(n * 2)} for n in range(5)]


def test_all_tests_must_pass():
    assert verify(task(CASES), fence("print(int(input()) * 2)")).correct
    verdict = verify(task(CASES), fence("n = int(input())\nprint(n * 2 if n < 4 else 0)"))
    assert (verdict.status, verdict.reward) == ("wrong_answer", 0.0)
    assert "Passed 4 of 5" in verdict.feedback


def test_feedback_prefers_a_crash_then_a_limit_then_the_two_shortest():
    crash = "n = int(input())\nif n == 3: raise ValueError('boom')\nprint(0)"
    feedback = verify(task(CASES), fence(crash)).feedback
    assert "boom" in feedback
    assert "Runtime error on this input:\n3" in feedback
    slow = "n = int(input())\nwhile n == 2: pass\nprint(0)"
    verdict = verify(task(CASES, time_limit_s=0.3), fence(slow))
    assert verdict.status == "wrong_answer"
    assert "Time limit exceeded on this input:\n2" in verdict.feedback
    cases = [{"input": "1" * n, "output": "x" * n} for n in (3000, 5, 900, 7)]
    feedback = verify(task(cases), fence("print('y' * 4000)")).feedback
    assert feedback.count("Expected:") == 2
    assert "Input:\n11111\n" in feedback
    assert "Input:\n1111111\n" in feedback
    assert len(feedback) <= 2000


def test_a_text_without_a_program_earns_nothing():
    verdict = verify(task(CASES), "print(2)")
    assert (verdict.status, verdict.reward, verdict.correct) == ("format", 0.0, False)


def test_the_arguments_of_a_call_are_shown_as_they_are():
    verdict = verify(task([{"args": ["é"], "expected": "e"}]), fence("def f(x): return x"))
    assert '["é"]' in verdict.feedback


@given(st.text(max_size=50))
def test_any_text_is_a_completion(text):
    assert verify(task(CASES), text).status in ("format", "runtime_error", "wrong_answer")


@pytest.mark.parametrize(
    "text", ["```\n\ud800\n```", "```\n" + "x = '" + "\U0001f600" * 50_000 + "'\n```", "```\n\x00\n```"]
)
def test_unusual_programs_get_a_verdict(text):
    assert verify(task(CASES), text).status in ("runtime_error", "wrong_answer")


@pytest.mark.parametrize(
    ("expected", "program"),
    [
        ("\u8a9e" * 900_000, "print('\u8a9e' * 900_000)"),  # three bytes each
        ("3\n" * 200_000, "print('3.0000000\\n' * 200_000)"),
        ("x" * (8 << 20), "print('x' * (8 << 20))"),
    ],
)
def test_long_outputs_can_be_right(expected, program):
    assert verify(task([{"input": "", "output": expected}]), fence(program)).status == "ok"


def test_only_the_beginning_of_an_output_is_kept():
    case = {"input": "", "output": "3"}
    result = run_test("print(3, ' ' * 10**6)", CODE, case)
    assert (result.status, result.output) == ("ok", "3")
    result = run_test("import sys\nfor out in (sys.stderr, sys.stdout): print('x' * 10**6, file=out)", CODE, case)
    assert (result.status, len(result.output), len(result.error)) == ("wrong_answer", MAX_EXCERPT, MAX_EXCERPT)


LONG = 10**49_999 + 7


def test_integers_of_fifty_thousand_digits():
    text = str(LONG)
    assert verify(task([{"input": text, "output": text}]), fence("print(int(input()))")).status == "ok"
    assert verify(task([{"input": text, "output": "7"}]), fence("print(int(input()) % 10)")).status == "ok"
    assert verify(task([{"args": [LONG], "expected": LONG + 1}]), fence("def f(x): return x + 1")).status == "ok"
    assert verify(task([{"args": [LONG], "expected": LONG}]), fence("def f(x): return x + 1")).status == "wrong_answer"
    printed = verify(task([{"input": "", "output": "1"}]), fence("print(10**60_000)"))
    assert (printed.status, "50000 digits" in printed.feedback) == ("runtime_error", True)
    assert not same_value("9" * 50_001, 9)


def test_a_task_file_may_hold_such_integers(tmp_path):
    tests = {"kind": "functional", "entry": "f", "cases": [{"args": [1], "expected": LONG}]}
    line = json.dumps({"id": "t", "prompt": "p", "verifier": "code", "tests": tests})
    (tmp_path / "t.jsonl").write_text(line)
    (read,), problems = read_task_file(str(tmp_path / "t.jsonl"), "test", DataConfig())
    assert problems == []
    assert read.tests["cases"][0]["expected"] == LONG


def test_functional_cases():
    cases = [{"args": [[3, 1, 2]], "expected": [1, 2, 3]}, {"args": [[]], "expected": []}]
    assert verify(task(cases), fence("def f(x): return sorted(x)")).correct
    assert verify(task(cases), fence("def f(x): return tuple(sorted(x))")).correct
    assert verify(task(cases), fence("def f(x): return [sorted(x)]")).status == "wrong_answer"
    nested = [{"args": [], "expected": [[1, 2]]}]
    assert verify(task(nested), fence("def f(): return [(1, 2)]")).status == "wrong_answer"  # as upstream
    deep = [{"args": [], "expected": json.loads("[" * 500 + "]" * 500)}]
    assert verify(task(deep), fence("def f():\n    x = []\n    for _ in range(499): x = [x]\n    return x")).correct
