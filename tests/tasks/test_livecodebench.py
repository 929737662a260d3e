"""LiveCodeBench: decoding without unpickling, date window, tests shown in training, bad rows."""

import base64
import json
import pickle
import zlib
from dataclasses import replace

import pytest

from pmd.config.schema import DataConfig
from pmd.errors import ConfigError
from pmd.tasks import describe_data_problems, duplicated_task_ids, load_tasks
from pmd.tasks.hub import load_rows
from pmd.tasks.livecodebench import decode_tests, make_tasks, string_of_pickle
from pmd.verifiers.pool import verify


def pack(value) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


def row(**changes):
    fields = {
        "question_content": "Add the numbers.", "question_id": "q", "starter_code": "", "metadata": "{}",
        "public_test_cases": json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}]),
        "private_test_cases": pack(json.dumps([{"input": f"{n} 2", "output": str(n + 2)} for n in range(9)])),
        "contest_date": "2025-02-15T00:00:00", "difficulty": "easy",
    }  # fmt: skip
    return {**fields, **changes}


def write(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return DataConfig(task="livecodebench", path=str(path))


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("protocol", range(1, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("text", ["[]", "x" * 300, "ü€" * 40000])
def test_a_string_is_read_from_any_pickle_protocol(protocol, text):
    assert string_of_pickle(pickle.dumps(text, protocol)) == text


@pytest.mark.parametrize("value", [Bomb(), ["[]"], ("a", "b"), 3, b"[]", None, {"a": 1}])
def test_any_other_pickle_is_refused_and_not_executed(value):
    with pytest.raises(ValueError, match="private_test_cases hold"):
        string_of_pickle(pickle.dumps(value))


@pytest.mark.parametrize(
    "text", ["", "no base64!", base64.b64encode(b"no zlib").decode(), pack("not json"), pack("[]")[:-8] + "A" * 8]
)
def test_damaged_fields_are_refused(text):
    with pytest.raises(ValueError, match=r"."):
        decode_tests(text)


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr("pmd.tasks.livecodebench.MAX_DECODED_BYTES", 1 << 16)
    with pytest.raises(ValueError, match="larger than"):
        decode_tests(base64.b64encode(zlib.compress(bytes(1 << 20))).decode())


def test_training_sees_half_of_the_private_tests():
    train, test = make_tasks(row(), seed=0)
    assert (train.split, test.split) == ("train", "test")
    assert train.task_id == test.task_id + "/train"
    assert (len(train.tests["cases"]), len(test.tests["cases"])) == (1 + 5, 1 + 9)
    assert all(case in test.tests["cases"] for case in train.tests["cases"])
    assert make_tasks(row(), seed=0)[0] == train
    assert any(make_tasks(row(), seed=seed)[0] != train for seed in range(1, 5))


def test_the_date_window_and_duplicates_by_protocol(tmp_path):
    days = ["2025-01-31", "2025-02-01", "2025-04-30", "2025-05-01"]
    config = write(tmp_path / "a.jsonl", [row(question_id=day, contest_date=f"{day}T00:00:00") for day in days])
    tasks = load_tasks(config, seed=0)
    assert [task.task_id for task in tasks["test"]] == [f"livecodebench/{day}" for day in days[1:3]]
    # train and test share problems on purpose, but these two rows ask the same by accident
    assert len(duplicated_task_ids(tasks)) == 2
    other = {"train": [tasks["train"][0]], "test": [tasks["test"][0]]}
    assert duplicated_task_ids(other) == frozenset()


def test_the_hub_loader_reads_a_local_folder(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps(row()) + "\n")
    (loaded,) = list(load_rows(str(tmp_path), "test"))
    assert make_tasks(loaded, 0) == make_tasks(row(), 0)


def test_bad_rows_are_all_named(tmp_path):
    no_id = row()
    del no_id["question_id"]
    bad = [row(private_test_cases="?"), no_id, row(contest_date="someday"), row(metadata='{"func_name": "not a name"}')]
    problems = describe_data_problems(write(tmp_path / "a.jsonl", bad))
    assert [problem.split(":")[1] for problem in problems] == ["1", "2", "3", "4"]
    assert "question_id is missing" in problems[1]
    with pytest.raises(ConfigError):
        load_tasks(DataConfig(task="livecodebench", path=str(tmp_path / "nowhere")), seed=0)


SOLUTIONS = {
    "pmd_sum": "input()\nprint(sum(map(int, input().split())))",
    "pmd_mean": "n = int(input())\nx = list(map(int, input().split()))\nprint(f'{sum(x) / n:.10f}')",
    "9001": "class Solution:\n    def add(self, a: int, b: int) -> int:\n        return a + b",
    "9002": (
        "class Solution:\n    def countCommon(self, xs: List[str], ys: List[str]) -> List[int]:\n"
        "        return sum(x in ys for x in xs), sum(y in xs for y in ys)"
    ),
}


def test_sample_problems_are_verified(data_folder):
    config = DataConfig(task="livecodebench", path=str(data_folder / "lcb_format"), validation_share=0.0)
    tasks = load_tasks(config, seed=0)
    assert len(tasks["train"]) == len(tasks["test"]) == 4
    for task in tasks["test"]:
        right = SOLUTIONS[task.task_id.split("/")[1]]
        for scorer in ("lcb", "sdpo"):
            scored = replace(task, tests={**task.tests, "scorer": scorer})
            assert verify(scored, f"So:\n```python\n{right}\n```").status == "ok", task.task_id
            assert verify(scored, "```python\npass\n```").status in ("wrong_answer", "runtime_error")
    mean = next(task for task in tasks["test"] if task.task_id.endswith("pmd_mean"))
    full_precision = SOLUTIONS["pmd_mean"].replace(":.10f", "")
    assert verify(mean, f"```\n{full_precision}\n```").status == "wrong_answer"  # numbers are compared exactly


def test_window_and_scorer_are_configurable(tmp_path):
    days = ["2024-12-31", "2025-01-01", "2025-01-31", "2025-02-01"]
    config = write(tmp_path / "a.jsonl", [row(question_id=day, contest_date=f"{day}T00:00:00") for day in days])
    config = replace(config, first_day="2025-01-01", end_day="2025-02-01", scorer="sdpo")
    tasks = load_tasks(config, seed=0)["test"]
    assert [task.task_id for task in tasks] == [f"livecodebench/{day}" for day in days[1:3]]
    assert {task.tests["scorer"] for task in tasks} == {"sdpo"}
    assert {task.tests["num_public"] for task in tasks} == {1}
    (empty,) = describe_data_problems(replace(config, first_day="2020-01-01", end_day="2020-01-02"))
    assert "widen the window" in empty
    wrong = describe_data_problems(replace(config, first_day="tomorrow", end_day="2025-02-30"))
    assert [problem.split("=")[0] for problem in wrong] == ["data.first_day", "data.end_day"]
    (order,) = describe_data_problems(replace(config, first_day="2025-02-01", path=None))
    assert "must lie before" in order
