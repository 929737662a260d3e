"""Tool-use tasks and their verifier."""

import gzip
import json
import shutil

import pytest

from pmd.config.schema import DataConfig
from pmd.tasks import describe_data_problems, load_tasks
from pmd.types import Message, Task
from pmd.verifiers.pool import verify
from pmd.verifiers.tool_use import OPTIONAL


def task(*calls):
    answer = json.dumps([{"Action": name, "Action_Input": json.dumps(inputs)} for name, inputs in calls])
    return Task("t", (Message("user", "Question: hm?"),), "tool_use", "test", answer=answer)


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
def test_calls(expected, text, status):
    verdict = verify(task(*expected), text)
    assert verdict.status == status
    assert verdict.correct == (status == "ok")
    assert (verdict.answer is None) == (status == "format")
    assert "find" not in verdict.feedback or status == "format"


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


def test_one_file_is_split(data_folder):
    tasks = load_tasks(DataConfig(task="tooluse", path=str(data_folder / "tooluse_test.jsonl.gz")), seed=0)
    assert (len(tasks["train"]), len(tasks["test"])) == (61, 7)


def test_bad_lines_and_missing_files_are_named(tmp_path):
    with gzip.open(tmp_path / "tooluse_train.jsonl.gz", "wt") as file:
        file.write('{"prompt": "p", "answer": "?"}\n{"answer": "[]"}\n')
    problems = describe_data_problems(DataConfig(task="tooluse", path=str(tmp_path)))
    assert len(problems) == 3
    assert "tooluse_test" in problems[2]
    assert "not on the Hub" in describe_data_problems(DataConfig(task="tooluse"))[0]
