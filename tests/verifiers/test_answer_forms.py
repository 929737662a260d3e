# ruff: noqa: E501
"""Answers in the many forms that models write them: which are right, and which only look right."""

import json

import pytest

from pmd.types import Message, Task
from pmd.verifiers.pool import verify

QUESTION = (Message("user", "Q?\n\nA: one\nB: two\nC: three"),)
DEEP = "[" * 5000 + "]" * 5000


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("<answer> B </answer>", "ok"), ("B</answer>", "ok"), ("<answer><answer>B</answer></answer>", "ok"),
        ("<think><answer>B</answer></think> C", "wrong_answer"), ("<answer>" * 100_000 + "B", "ok"),
        ("<answer>C</answer> <answer>B</answer>", "ok"), ("<answer>B</answer> <answer>C</answer>", "wrong_answer"),
        ("<answer>(B)</answer>", "format"), ("<answer>B, C</answer>", "format"), ("<answer>two</answer>", "format"),
        ("<answer>\N{CYRILLIC CAPITAL LETTER VE}</answer>", "format"), ("<answer>B\u200b</answer>", "format"),
        ("<answer>\N{GREEK CAPITAL LETTER BETA}</answer>", "format"), ("<answer>\ud800</answer>", "format"),
        ("<ANSWER>B</ANSWER>", "format"), ("<answer>\\boxed{B}</answer>", "format"), ("<answer>\0B</answer>", "format"),
    ],
)  # fmt: skip
def test_choices(text, status):
    assert verify(Task("t", QUESTION, "mcq", "test", answer="B"), text).status == status


@pytest.mark.parametrize(
    ("answer", "text", "correct"),
    [
        ("blue", "blue\r\n", True), ("blue", "red <answer>blue", True),
        ("9" * 10_000, "9" * 10_000, True), ("nan", "nan", True), ("a\nb", "a\r\nb", False), ("1", "1.0", False),
        ("blue", "b\N{CYRILLIC SMALL LETTER IE}lue", False), ("blue", "blue\u200b", False), ("blue", '"blue"', False),
        ("1", "\N{ARABIC-INDIC DIGIT ONE}", False), ("\N{LATIN SMALL LETTER E WITH ACUTE}", "e\u0301", False),
    ],
)  # fmt: skip
def test_texts(answer, text, correct):
    assert verify(Task("t", QUESTION, "exact", "test", answer=answer), text).correct == correct


@pytest.mark.parametrize(
    ("inputs", "text", "status"),
    [
        ('{"n": 1.5}', '{"n": 1.50}', "ok"), ('{"n": 0}', '{"n": -0.0}', "ok"), ('{"n": 10}', '{"n": 1e1}', "ok"),
        ('{"n": 1e300}', '{"n": 1e300}', "ok"), ('{"q": "\\u00e9"}', '{"q": "\u00e9"}', "ok"), ('{"": 1}', '{"":1}', "ok"),
        ('{"q": "Action: g\\nAction Input: {}"}', '{"q": "Action: g\\nAction Input: {}"}', "ok"),
        ('{"n": 9007199254740993}', '{"n": 9007199254740992.0}', "wrong_answer"),
        ('{"q": "\u00e9"}', '{"q": "e\u0301"}', "wrong_answer"), ('{"n": [1, 2]}', '{"n": [2, 1]}', "wrong_answer"),
        ('{"n": 1}', '{"n": 1, "m": null}', "wrong_answer"), ('{"n": 1}', '{"n": 2, "n": 3}', "wrong_answer"),
        ('{"n": 1}', f'{{"n": {"1" * 50_001}}}', "format"), ('{"n": 1}', f'{{"n": {DEEP}}}', "format"),
        ('{"n": 1}', '{"n": Infinity}', "format"), ('{"n": 1}', "{'n': 1}", "format"), ('{"n": 1}', '{"n": 1,}', "format"),
        ('{"n": 1}', '["n", 1]', "format"),
    ],
)  # fmt: skip
def test_inputs_of_calls(inputs, text, status):
    answer = json.dumps([{"Action": "f", "Action_Input": inputs}])
    for reading in ("strict", "sdpo"):
        task = Task("t", QUESTION, "tool_use", "test", answer=answer, tests={"reading": reading})
        verdict = verify(task, f"Action: f\nAction Input: {text}\nDone.")
        assert verdict.correct == (status == "ok")
        assert verdict.status == status or (reading, status) == ("sdpo", "format")


def program_verdict(program, **tests):
    task = Task("t", QUESTION, "code", "test", tests={**tests, "time_limit_s": 5})
    return verify(task, f"```python\n{program}\n```").status


@pytest.mark.parametrize(
    ("args", "expected", "body", "status"),
    [
        ([[3, 1]], None, "x.sort()", "ok"), ([[3, 1]], [1, 3], "x.sort()", "wrong_answer"),
        ([1], 0.3, "return 0.1 + 0.2", "wrong_answer"), ([1], None, "return 0", "wrong_answer"),
        ([1], None, "import os; os._exit(0)", "runtime_error"), ([1], {"a": 2}, "return Counter('aa')", "ok"),
        ([1], {"1": 2}, "return {1: 2}", "wrong_answer"), ([1], ["a"], "return {'a': 1}.keys()", "wrong_answer"),
        ([1], [1, 2], "return map(int, '12')", "wrong_answer"), ([1], [1], "return deque([1])", "wrong_answer"),
        ([1], 1, "return True", "ok"), ([1], 2**53 + 1, "return float(2**53)", "wrong_answer"),
        ([1], 10**4000, "return 10**4000", "ok"), (["\ud800\0"], "\ud800\0", "return x", "ok"), ([1], 0, "return -0.0", "ok"),
        ([1], "\u00e9", "return 'e\\u0301'", "wrong_answer"), ([1], float("inf"), "return inf", "ok"),
        ([1], float("nan"), "return nan", "wrong_answer"), ([float("nan")], True, "return x != x", "ok"),
        ([1], True, "import unittest.mock as m; return m.ANY", "wrong_answer"), ([10**7], None, "print('x' * x)", "ok"),
        ([10**8], None, "print('x' * x)", "output_limit"),
    ],
)  # fmt: skip
def test_values(args, expected, body, status):
    case = {"args": args, "expected": expected}
    assert program_verdict(f"def f(x):\n    {body}", kind="functional", entry="f", cases=[case]) == status


@pytest.mark.parametrize(
    ("expected", "printed", "correct"),
    [
        ("1\r\n2\r\n", "1\n2", True), ("1\n2", "1\n2\n\n\n", True), ("", "", True), ("3.0", "3", True), ("1 2", "1   2", True),
        ("9" * 5000, "9" * 5000, True), ("9" * 5000, "9" * 4999 + "8", False), ("", "3", False), ("1\n2\n3", "1\n2", False),
        ("1\n\n2", "1\n2", False), ("1\n2", "1 2", False), ("1\n2", "1\r2", False), ("a b", "a  b", False),
        ("YES", "Yes", False), ("1000", "1_000", False), ("1 2", "1\u00a02", False), ("1", "1\u2003", False),
        ("1", "1\x1c", False), ("12", "\u0661\u0662", False), ("inf", "Infinity", False), ("nan", "NaN", False),
    ],
)  # fmt: skip
def test_outputs(expected, printed, correct):
    case = {"input": "", "output": expected}
    assert (program_verdict(f"print({printed!r}, end='')", kind="stdin", cases=[case]) == "ok") == correct
