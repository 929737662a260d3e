"""Any table is a data set: formats, columns by name, choices, conversational prompts, and the Hub's layout."""

import csv
import json

import pytest
from datasets import Dataset, DatasetDict

from pmd.config.schema import DataConfig
from pmd.errors import ConfigError
from pmd.tasks import describe_data_problems, load_tasks
from pmd.tasks.splits import duplicated_task_ids
from pmd.types import Message

QUESTIONS = [{"q": f"What is {n} + {n}?", "label": 2 * n, "topic": "sums"} for n in range(20)]
COLUMNS = {"prompt": "q", "answer": "label", "domain": "topic"}


def load(path, **keys):
    return load_tasks(DataConfig(task="jsonl", path=str(path), validation_share=0, **keys), seed=0)


def everything(tasks):
    return {task.task_id: task for part in ("train", "test") for task in tasks[part]}


def write(path, rows):
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        from pyarrow import Table
        from pyarrow.parquet import write_table

        write_table(Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps({"data": rows}))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_tasks(suffix, tmp_path):
    found = everything(load(write(tmp_path / f"t{suffix}", QUESTIONS), columns=COLUMNS, verifier="exact"))
    assert sorted(found, key=lambda name: int(name.split("-")[1])) == [f"train-{n}" for n in range(1, 21)]
    task = found["train-4"]
    assert (task.question, task.answer, task.domain, task.verifier) == ("What is 3 + 3?", "6", "sums", "exact")
    assert task.place.endswith(f"t{suffix}:4")


def test_a_column_that_is_not_there_is_named(tmp_path):
    problems = describe_data_problems(
        DataConfig(task="jsonl", path=str(write(tmp_path / "t.csv", QUESTIONS)), columns={"prompt": "question"})
    )
    assert problems == [f"data.columns: {tmp_path / 't.csv'} has no column question; its columns are label, q, topic."]
    wrong = DataConfig(task="jsonl", path="t.csv", columns={"promt": "q", "answer": ["a", "b"], "choices": ["a"]})
    said = "\n".join(describe_data_problems(wrong))
    assert all(word in said for word in ("columns.promt", "columns.answer", "columns.choices"))


@pytest.mark.parametrize("text", ["a,b\n1,2,3\n", "{", '"text"', "[1, 2]"])
@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet"])
def test_a_broken_file_is_one_sentence(suffix, text, tmp_path):
    path = tmp_path / f"t{suffix}"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"t{suffix}"):
        load(path)


MMLU = {"question": "Which is a prime?", "choices": ["4", "6", "7", "9"], "answer": 2, "subject": "numbers"}
GPQA = {
    "Question": "What is it?", "Correct Answer": "right", "Incorrect Answer 1": "w1", "Incorrect Answer 2": "w2",
    "Incorrect Answer 3": "w3",
}  # fmt: skip


def test_choices_in_one_column_keep_their_order(tmp_path):
    rows = [{**MMLU, "question": f"{n}?"} for n in range(10)]
    rows += [{**MMLU, "question": "by text", "answer": "9"}, {**MMLU, "question": "by letter", "answer": "B"}]
    path = write(tmp_path / "mmlu.parquet", [{**row, "answer": str(row["answer"])} for row in rows])
    tasks = everything(load(path, columns={"prompt": "question", "choices": "choices", "domain": "subject"}))
    first = tasks["train-1"]
    assert first.question.startswith("0?\nA: 4\nB: 6\nC: 7\nD: 9\nPut the letter")
    assert (first.answer, first.verifier, first.memory_key, first.domain) == ("C", "mcq", "0?", "numbers")
    assert [tasks[f"train-{n}"].answer for n in (11, 12)] == ["D", "B"]


def test_a_number_is_a_position_and_a_label_is_what_the_row_says(tmp_path):
    columns = {"prompt": "question", "choices": "choices"}
    rows = [{"question": f"{n}?", "choices": ["4", "2", "0", "1"], "answer": 1} for n in range(10)]
    assert everything(load(write(tmp_path / "mmlu.parquet", rows), columns=columns))["train-1"].answer == "B"
    rows = [{**row, "choices": [4, 2, 0, 1]} for row in rows]
    assert everything(load(write(tmp_path / "numbers.parquet", rows), columns=columns))["train-1"].answer == "D"
    arc = {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}
    rows = [{"question": f"{n}?", "choices": arc, "answer": "2"} for n in range(10)]
    assert everything(load(write(tmp_path / "arc.jsonl", rows), columns=columns))["train-1"].answer == "B"


BAD_CHOICES = [
    ({"choices": []}, "choices=[]: must be a list of 2 to 26 options, none of them empty"),
    ({"choices": ["a", None]}, "none of them empty"),
    ({"choices": [str(n) for n in range(27)]}, "a list of 2 to 26 options"),
    ({"choices": "a"}, 'choices="a": must be a list'),
]


@pytest.mark.parametrize(("changes", "said"), BAD_CHOICES)
def test_options_that_are_none_are_named(changes, said, tmp_path):
    path = write(tmp_path / "mmlu.jsonl", [{**MMLU, **changes}])
    columns = {"prompt": "question", "choices": "choices"}
    (problem,) = describe_data_problems(DataConfig(task="jsonl", path=str(path), columns=columns))
    assert f"mmlu.jsonl:1: {said}" in problem or said in problem


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"Correct Answer": ""}, 'Correct Answer="": is the right option and must not be empty'),
        (dict.fromkeys(list(GPQA)[2:], ""), "there must be another option"),
    ],
)
def test_a_row_without_the_right_option_or_without_another_is_named(changes, said, tmp_path):
    path = write(tmp_path / "gpqa.csv", [{**GPQA, **changes}])
    columns = {"prompt": "Question", "choices": [name for name in GPQA if name != "Question"]}
    (problem,) = describe_data_problems(DataConfig(task="jsonl", path=str(path), columns=columns))
    assert said in problem


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_own_verifiers_get_numbers_as_they_are_and_built_in_ones_as_text(suffix, tmp_path):
    path = write(tmp_path / f"t{suffix}", [{"prompt": f"{n}?", "answer": n} for n in range(10)])
    task = everything(load(path, verifier="exact"))["train-3"]
    assert task.answer == "2"
    assert everything(load(path, verifier="verifiers_of_ours.near"))["train-3"].columns["answer"] == 2


def test_a_row_that_lacks_a_column_is_named(tmp_path):
    path = write(tmp_path / "t.jsonl", [{"q": "1?", "answer": "1"}, {"answer": "2"}])
    (problem,) = describe_data_problems(
        DataConfig(task="jsonl", path=str(path), columns={"prompt": "q"}, verifier="exact")
    )
    assert "t.jsonl:2: prompt is missing" in problem


def test_choices_in_several_columns_are_shuffled_by_seed(tmp_path):
    path = write(tmp_path / "gpqa.csv", [{**GPQA, "Question": f"{n}?"} for n in range(40)])
    columns = {"prompt": "Question", "choices": [name for name in GPQA if name != "Question"]}
    tasks = everything(load(path, columns=columns))
    assert {task.answer for task in tasks.values()} == set("ABCD")
    for task in tasks.values():
        assert f"\n{task.answer}: right" in task.question
    assert tasks == everything(load(path, columns=columns))


def test_an_answer_at_the_end_of_a_solution(tmp_path):
    rows = [{"question": f"{n}?", "answer": f"2 #### of it\n#### {n},000"} for n in range(10)]
    keys = {"columns": {"prompt": "question"}, "answer_after": "####", "verifier": "math"}
    task = everything(load(write(tmp_path / "gsm8k.jsonl", rows), prompt_suffix="\\nBox it.", **keys))["train-3"]
    assert (task.answer, task.question, task.memory_key) == ("2,000", "2?\nBox it.", "2?")


def test_conversational_prompts_are_messages(tmp_path):
    history = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    rows = [{"prompt": [*history, {"role": "user", "content": f"{n}?"}], "answer": "x"} for n in range(10)]
    task = everything(load(write(tmp_path / "trl.parquet", rows), verifier="exact"))["train-1"]
    assert task.messages == (*(Message(m["role"], m["content"]) for m in history), Message("user", "0?"))


def test_conversations_that_end_alike_are_different_tasks(tmp_path):
    rows = [
        {
            "messages": [
                {"role": r, "content": c} for r, c in (("user", f"{n}?"), ("assistant", "x"), ("user", "Again."))
            ]
        }
        for n in range(10)
    ]
    tasks = load(write(tmp_path / "turns.jsonl", [{**row, "answer": "x"} for row in rows]), verifier="exact")
    assert [len(tasks[split]) for split in ("train", "test")] == [9, 1]
    assert duplicated_task_ids(tasks) == frozenset()
    assert everything(tasks)["train-1"].question == "User: 0?\n\nAssistant: x\n\nUser: Again."


def test_a_file_that_is_not_there_is_not_sought_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("tasks/train.jsonl", "tasks/t.parquet"):
        problems = describe_data_problems(DataConfig(task="jsonl", path=path, verifier="exact"))
        assert problems == [
            f"{path}: no such file; give a JSON Lines, JSON, CSV or Parquet file with one task per row."
        ]


@pytest.fixture(params=["files", "saved", "saved without splits"])
def folder(request, tmp_path, monkeypatch):
    """A folder of a data set, with a split `test` of two rows, if it has splits."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    found = tmp_path / "set"
    found.mkdir()
    if request.param == "files":
        write(found / "train.parquet", QUESTIONS[2:])
        write(found / "test.parquet", QUESTIONS[:2])
    elif request.param == "saved":
        splits = {"train": Dataset.from_list(QUESTIONS[2:]), "test": Dataset.from_list(QUESTIONS[:2])}
        DatasetDict(splits).save_to_disk(found)
    else:
        Dataset.from_list(QUESTIONS[2:]).save_to_disk(found)
    return found, request.param != "saved without splits"


def test_a_folder_is_a_data_set(folder):
    path, has_splits = folder
    keys = {"columns": COLUMNS, "verifier": "exact"}
    assert describe_data_problems(DataConfig(task="jsonl", path=str(path), **keys)) == []
    assert len(everything(load(path, **keys))) == 18
    if has_splits:
        tasks = load(path, test_split="test", **keys)
        assert [len(tasks[split]) for split in ("train", "test")] == [18, 2]
        assert tasks["test"][1].question == "What is 1 + 1?"
    with pytest.raises(ConfigError, match=r"data: the folder .* cannot be loaded \(.*nowhere"):
        load(path, test_split="nowhere", **keys)


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="give one with the files of a data set, or one of its files"):
        load(tmp_path, verifier="exact")


def test_a_table_without_prompts_is_told_of_columns(tmp_path):
    path = write(tmp_path / "t.csv", [{"Question": "1?", "answer": "1"}])
    (problem,) = describe_data_problems(DataConfig(task="jsonl", path=str(path), verifier="exact"))
    assert problem.endswith("write the question there, or name its column in data.columns.prompt.")


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    folder = tmp_path / "owner" / "sums"
    folder.mkdir(parents=True)
    for split, rows in (("train", QUESTIONS[:15]), ("test", QUESTIONS[15:])):
        write(folder / f"{split}.parquet", rows)
    monkeypatch.setattr("pmd.tasks.table.is_data_set", lambda path: path == "owner/sums")
    monkeypatch.setattr("pmd.tasks.is_data_set", lambda path: path == "owner/sums")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert describe_data_problems(DataConfig(task="jsonl", path="owner/sums", columns=COLUMNS)) == []
    tasks = load("owner/sums", columns=COLUMNS, verifier="exact", test_split="test")
    assert (len(tasks["train"]), len(tasks["test"])) == (15, 5)
    assert {task.task_id for task in tasks["test"]} == {f"test-{n}" for n in range(1, 6)}
    assert not {task.question for task in tasks["train"]} & {task.question for task in tasks["test"]}
