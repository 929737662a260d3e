"""Tool-use tasks and their verifier."""

import contextlib
import gzip
import json
import re
import shutil
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmd.config.schema import DataConfig
from pmd.tasks import describe_data_problems, load_tasks
from pmd.types import Message, Task
from pmd.verifiers.pool import verify
from pmd.verifiers.tool_use import OPTIONAL


def task(*calls, reading="sdpo"):
    answer = json.dumps([{"Action": name, "Action_Input": json.dumps(inputs)} for name, inputs in calls])
    tests = {"reading": reading}
    return Task("t", (Message("user", "Question: hm?"),), "tool_use", "test", answer=answer, tests=tests)


def written(*calls):
    return "\n".join(f"Thought: so\nAction: {name}\nAction Input: {json.dumps(inputs)}" for name, inputs in calls)


ONE, TWO = ("find", {"q": "a", "page": 1}), ("find", {"q": "b", "page": 1})
DEEP = "Action: find\nAction Input: " + '{"a":' * 100_000


@pytest.mark.parametrize(
    ("expected", "text", "status"),
    [
        ([ONE], written(ONE), "ok"),
        ([ONE, TWO], written(TWO, ONE), "ok"),
        ([ONE], 'Action: find\r\nAction Input: {"page": 1.0,\n "q": "a"} and so on', "ok"),
        ([("set", {"p": {"x": [{"y": 1}]}})], 'Action: set\nAction Input: {"p": {"x": [{"y": 1}]}}', "ok"),
        ([("go", {})], "Action: go\nAction Input: {}", "ok"),
        ([ONE], 'Action: find\nAction Input:\r\n\n{"page": 1, "q": "a"}', "ok"),
        ([ONE], written(ONE, ONE), "wrong_answer"),
        ([ONE, TWO], written(TWO), "wrong_answer"),
        ([ONE, TWO], written(TWO, TWO), "wrong_answer"),  # the union of inputs hides the difference
        ([("a", {"x": 1}), ("b", {"y": 2})], written(("a", {"y": 2}), ("b", {"x": 1})), "wrong_answer"),
        ([("go", {"n": 1})], 'Action: go\nAction Input: {"n": true}', "wrong_answer"),
        ([("go", {"n": 1})], 'Action: go\nAction Input: {"n": "1"}', "wrong_answer"),
        ([("go", {})], "Action: go\nAction Input: {", "format"),
        ([("go", {})], "Action: go\nAction Input: null", "format"),
        ([("go", {})], "Action: go", "format"),
        ([("go", {"n": 1})], 'Action: go\nAction Input: {"n": NaN}', "format"),
        ([ONE], "no call at all", "format"),
        ([ONE], DEEP, "format"),
        ([ONE], "Action: find\n" * 1000, "format"),
        ([ONE], written(("find", {"q": "a", "page": 10**400})), "wrong_answer"),
        ([ONE, (OPTIONAL + "log", {})], written(ONE), "ok"),
        ([ONE, (OPTIONAL + "log", {})], written(ONE, ("log", {})), "ok"),
        ([ONE, (OPTIONAL + "log", {})], written(ONE, ("log", {}), ("log", {})), "wrong_answer"),
    ],
)
def test_strictly_read_calls(expected, text, status):
    verdict = verify(task(*expected, reading="strict"), text)
    assert verdict.status == status
    assert verdict.correct == (status == "ok")
    assert (verdict.answer is None) == (status == "format")
    assert "find" not in verdict.feedback or status == "format"
    assert verify(task(*expected), text).correct or status != "ok"  # the default accepts whatever is strictly right


def reference(text, expected):
    """SDPO's rule, written from its description."""
    merged = {}
    for block in re.findall(r"Action Input:\s*({.*?})", text, re.DOTALL):
        with contextlib.suppress(ValueError, RecursionError):
            merged.update(json.loads(block))
    wanted = {key: value for _, inputs in expected for key, value in inputs.items()}
    names = Counter(re.findall(r"Action:\s*(\w+)", text))
    return names == Counter(name for name, _ in expected) and merged == wanted


INPUT = 'Action Input: {"q": "a", "page": 1}'


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        ([ONE], f"Thought: look. Action: find\n{INPUT}"),
        ([ONE], f"1. Action: find\n   {INPUT}"),
        ([ONE], f"- Action: find {INPUT}"),
        ([ONE], f"> Action: find\n> {INPUT}"),
        ([ONE], f"Action: find()\n{INPUT}"),
        ([ONE], f"Action: find.\n{INPUT}."),
        ([ONE], f"Action:\nfind\n{INPUT}"),
        ([ONE], f"Action:find\nAction Input:{INPUT[13:]}"),
        ([ONE], f"{INPUT}\nAction: find"),
        ([ONE], f"```\nAction: find\n{INPUT}\n```"),
        ([ONE], "Action: find\nAction Input: {'q'}\n" + INPUT),
        ([ONE], 'Action: find\nAction Input: {"q": "a", "page": true}'),
        ([ONE], 'Action: find\nAction Input: {"q": "a"} Action Input: {"page": 1}'),
        ([("a", {"x": 1}), ("b", {"y": 2})], written(("a", {"y": 2}), ("b", {"x": 1}))),
        ([ONE, TWO], written(TWO, ("find", {"q": "b"}))),
        ([("go", {})], "Action: go"),
        ([("go", {})], "Action: go\nAction Input: {"),
        ([("go", {})], "Action: go\nAction Input: null"),
        ([("go", {})], 'Action: go\nAction Input: {"a": {"b": 1}}'),
        ([("go", {})], "Action: go\nAction Input: " + '{"a":' * 100_000),
        ([], "I need no tool for this."),
        ([], ""),
        # wrong
        ([ONE], f"Action: look\n{INPUT}"),
        ([ONE], "Action: find"),
        ([ONE], f"Action: find\nAction: find\n{INPUT}"),
        ([ONE], f"**Action:** find\n{INPUT}"),
        ([ONE], ""),
        ([], written(ONE)),
        ([("go", {"n": 1})], 'Action: go\nAction Input: {"n": "1"}'),
        ([("go", {"n": 1})], 'Action: go\nAction Input: {"n": NaN}'),
        ([ONE], "Action: find\n" * 1000),
        ([("go", {"n": 1})], 'Action: go\nAction Input: {"n": ' + "[" * 900 + "]" * 900 + "}"),
    ],
)
def test_by_default_calls_are_read_as_sdpo_reads_them(expected, text):
    verdict = verify(task(*expected), text)
    assert verdict.scored
    assert verdict.correct == reference(text, expected)


NAMES = st.sampled_from(["find", "find()", "go", "\nfind", "", "x y"])
INPUTS = st.sampled_from(['{"q": "a", "page": 1}', '{"q": "a"}', '{"page": 1.0}', "{}", "{", "}", "null", '{"q": {}}'])
PARTS = st.one_of(NAMES.map("Action: {}".format), INPUTS.map("Action Input: {}".format), st.just("Thought: so"))


@settings(max_examples=60, deadline=None)
@given(st.lists(PARTS, max_size=6).map("\n".join))
def test_whatever_the_reference_accepts_is_right(text):
    for expected in ([], [ONE], [("find", {}), ("go", {"page": 1})]):
        assert verify(task(*expected), text).correct >= reference(text, expected)


def test_an_optional_call_may_be_made_in_any_form():
    expected = ONE, (OPTIONAL + "log", {"x": 1})
    assert verify(task(*expected), f"Now Action: find\n{INPUT}").correct
    assert verify(task(*expected), f'Now Action: find\n{INPUT}\nand Action: log\nAction Input: {{"x": 1}}').correct
    assert not verify(task(*expected), f'Now Action: find\n{INPUT}\nand Action: log\nAction Input: {{"x": 2}}').correct
    assert not verify(task(*expected), f"Now Action: find\n{INPUT}\nand Action: log\nAction: log").correct


def test_where_no_call_is_expected_none_is_right_in_both_readings():
    for reading in ("sdpo", "strict"):
        assert verify(task(reading=reading), "Thought: nothing to do.").correct
        assert not verify(task(reading=reading), written(ONE)).correct


def test_feedback_says_whether_actions_or_inputs_are_wrong():
    assert "not their inputs" in verify(task(ONE), written(TWO)).feedback
    assert "actions are not the right" in verify(task(ONE), written(("go", {}))).feedback


def test_every_real_answer_passes_and_no_other_does(data_folder, tmp_path):
    for split in ("train", "test"):
        shutil.copy(data_folder / "tooluse_test.jsonl.gz", tmp_path / f"tooluse_{split}.jsonl.gz")
    tasks = load_tasks(DataConfig(task="tooluse", path=str(tmp_path)), seed=0)["test"]
    assert len(tasks) == 68
    for one in tasks:
        calls = [(c["Action"].removeprefix(OPTIONAL), json.loads(c["Action_Input"])) for c in json.loads(one.answer)]
        assert verify(one, written(*calls)).correct, one.task_id
        assert not verify(one, written(*calls, ("go", {}))).correct
        assert not verify(one, written(*calls[1:])).correct
        assert "Name:" not in one.memory_key


def test_the_reading_is_checked(tmp_path):
    line = {"id": "t", "prompt": "p", "verifier": "tool_use", "answer": "[]", "tests": {"reading": "loose"}}
    (tmp_path / "t.jsonl").write_text(json.dumps(line))
    assert (
        "reading must be sdpo or strict"
        in describe_data_problems(DataConfig(task="jsonl", path=str(tmp_path / "t.jsonl")))[0]
    )


def test_one_file_is_split(data_folder):
    path = str(data_folder / "tooluse_test.jsonl.gz")
    tasks = load_tasks(DataConfig(task="tooluse", path=path, validation_share=0), seed=0)
    assert (len(tasks["train"]), len(tasks["test"])) == (61, 7)


def test_bad_lines_and_missing_files_are_named(tmp_path):
    with gzip.open(tmp_path / "tooluse_train.jsonl.gz", "wt") as file:
        file.write('{"prompt": "p", "answer": "?"}\n{"answer": "[]"}\n')
    problems = describe_data_problems(DataConfig(task="tooluse", path=str(tmp_path)))
    assert len(problems) == 3
    assert "tooluse_test" in problems[2]
    assert "not on the Hub" in describe_data_problems(DataConfig(task="tooluse"))[0]
