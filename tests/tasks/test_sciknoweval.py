"""SciKnowEval: SDPO's split and prompts on the real files, duplicates, bad lines."""

import gzip
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from pmd.config.schema import DataConfig
from pmd.errors import ConfigError
from pmd.tasks import describe_data_problems, duplicated_task_ids, find_duplicates, load_tasks
from pmd.tasks.hub import load_rows
from pmd.tasks.sciknoweval import split_permutation, split_upstream, split_without_duplicates, system_prompt

DOMAINS = ["biology", "chemistry", "material", "physics"]


def upstream_row(number, domain="Chemistry", level="L3", kind="mcq-4-choices"):
    return {
        "question": f"Which is {number}?",
        "choices": {"text": ["w", "x", "y", "z"], "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[number % 4],
        "type": kind,
        "domain": domain,
        "details": {"level": level, "task": "t", "subtask": "s"},
    }


UPSTREAM = [
    *(upstream_row(n) for n in range(40)),
    *(upstream_row(100 + n, level="L1") for n in range(10)),
    *(upstream_row(200 + n, kind="open-ended-qa") for n in range(10)),
    *(upstream_row(300 + n, domain="Physics") for n in range(20)),
]


def whole(folder, domains):
    """Return SDPO's split, of which nothing is held out for validation."""
    return DataConfig(task="sciknoweval", path=str(folder), domains=domains, validation_share=0.0)


def test_real_files_have_sdpos_sizes_and_prompts(data_folder):
    tasks = load_tasks(whole(data_folder, DOMAINS), seed=0)
    assert (len(tasks["train"]), len(tasks["test"])) == (3901, 434)
    assert tasks["validation"] == tasks["test"]
    assert {task.split for task in tasks["validation"]} == {"test"}
    task = tasks["train"][0]
    assert [m.role for m in task.messages] == ["system", "user"]
    assert task.messages[0].content == system_prompt() == (data_folder / "sciknoweval_system_prompt.txt").read_text()
    assert task.question.startswith(task.memory_key + "\n\nA: ")
    assert task.question.endswith("\nPlease reason step by step.")


def test_the_hub_rule_gives_the_split_of_the_real_files(data_folder):
    for domain in DOMAINS:
        tasks = load_tasks(whole(data_folder, [domain]), seed=0)
        numbers = {part: [int(t.task_id.split("/")[-1]) for t in tasks[part]] for part in ("train", "test")}
        assert split_permutation(sum(map(len, numbers.values()))) == (numbers["train"], numbers["test"])


def test_duplicates_of_the_real_files(data_folder):
    tasks = load_tasks(whole(data_folder, DOMAINS), seed=0)
    report = find_duplicates(tasks["train"] + tasks["test"])
    assert len(report.same_prompt) == 1
    assert report.same_prompt[0][0].startswith("sciknoweval/material/")
    assert len({held_out for _, held_out in report.same_stem}) >= 28
    assert duplicated_task_ids(tasks) == {report.same_prompt[0][0]}
    assert "kept out of memory: 1." in str(report)


def test_the_own_split_has_no_question_on_both_sides(data_folder):
    tasks = load_tasks(whole(data_folder, DOMAINS), seed=0)
    everything = tasks["train"] + tasks["test"]
    divided = split_without_duplicates(everything, seed=5)
    report = find_duplicates(divided)
    assert not report.same_prompt
    assert not report.same_stem
    assert str(report).startswith("No task")
    assert {task.task_id for task in divided} == {task.task_id for task in everything}
    for domain, count in (("biology", 50), ("chemistry", 210), ("material", 94), ("physics", 80)):
        assert sum(t.domain == domain and t.split == "test" for t in divided) == pytest.approx(count, abs=2)


def test_validation_share_keeps_equal_stems_on_one_side(data_folder):
    config = DataConfig(task="sciknoweval", path=str(data_folder), domains=["material"], validation_share=0.2)
    first, again, other = (load_tasks(config, seed=seed) for seed in (3, 3, 4))
    assert first == again != other
    assert {task.split for task in first["validation"]} == {"validation"}
    assert len(first["validation"]) == pytest.approx(0.2 * 841, abs=25)
    assert not {t.memory_key for t in first["train"]} & {t.memory_key for t in first["validation"]}


def test_other_domains_may_be_tested_than_trained(data_folder):
    config = DataConfig(task="sciknoweval", path=str(data_folder), domains=["physics"], test_domains=["biology"])
    tasks = load_tasks(config, seed=0)
    domains = {split: {task.domain for task in part} for split, part in tasks.items()}
    assert domains == {"train": {"physics"}, "validation": {"physics"}, "test": {"biology"}}


def test_smaller_subsets_are_prefixes_of_larger_ones(data_folder):
    def ids(max_train, part):
        config = DataConfig(
            task="sciknoweval", path=str(data_folder), max_train=max_train, max_validation=5, max_test=7
        )
        return [task.task_id for task in load_tasks(config, seed=1)[part]]

    assert ids(10, "train") == ids(20, "train")[:10]
    assert (len(ids(10, "validation")), len(ids(10, "test"))) == (5, 7)


def test_hub_rows_are_filtered_and_split(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(map(json.dumps, UPSTREAM)))
    tasks = split_upstream(load_rows(str(tmp_path), "test"), ["chemistry", "physics"])
    sizes = Counter((task.domain, task.split) for task in tasks)
    assert sizes == {
        ("chemistry", "train"): 36,
        ("chemistry", "test"): 4,
        ("physics", "train"): 18,
        ("physics", "test"): 2,
    }
    assert all("Please reason step by step." in task.question for task in tasks)
    numbers = [int(t.task_id.split("/")[-1]) for t in tasks if t.domain == "chemistry" and t.split == "test"]
    assert numbers == np.random.default_rng(42).permutation(40)[:4].tolist()


def test_the_split_equals_that_of_datasets():
    from datasets import Dataset

    divided = Dataset.from_dict({"n": list(range(57))}).train_test_split(test_size=0.1, seed=42)
    assert split_permutation(57) == (divided["train"]["n"][:], divided["test"]["n"][:])


def test_a_local_upstream_file_gives_the_same_tasks_as_the_hub(tmp_path):
    path = tmp_path / "sciknoweval_test_v2.jsonl"
    path.write_text("\n".join(map(json.dumps, UPSTREAM)))
    config = DataConfig(task="sciknoweval", path=str(path), domains=["chemistry"], validation_share=0.0)
    tasks = load_tasks(config, seed=0)
    assert tasks["train"] + tasks["test"] == split_upstream(UPSTREAM, ["chemistry"])


def test_all_bad_lines_are_named_at_once(tmp_path):
    good = {"id": "1", "question": "q", "options": {"A": "x"}, "answer": "A", "prompt": "q\n\nA: x"}
    with gzip.open(tmp_path / "sciknoweval_chemistry_train.jsonl.gz", "wt") as file:
        file.write(json.dumps(good) + "\nnot json\n" + json.dumps({**good, "id": "2", "answer": "Q"}) + "\n[1]\n")
        file.write(json.dumps(good) + "\n")
    config = DataConfig(task="sciknoweval", path=str(tmp_path))
    with pytest.raises(ConfigError) as raised:
        load_tasks(config, seed=0)
    text = str(raised.value)
    assert all(f"train.jsonl.gz:{number}:" in text for number in (2, 3, 4, 5))
    assert 'answer="Q": must be one of the options A' in text
    assert "sciknoweval_chemistry_test.jsonl" in text
    assert describe_data_problems(config) == raised.value.problems


def test_a_missing_path_is_named(tmp_path):
    problems = describe_data_problems(DataConfig(task="sciknoweval", path=str(tmp_path / "nowhere")))
    assert len(problems) == 1
    assert "nowhere" in problems[0]
    assert "data.path" in problems[0]


def test_a_hub_failure_says_what_to_do(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", fail)
    monkeypatch.setattr("pmd.tasks.hub.prepare_hub", lambda _: None)
    with pytest.raises(ConfigError, match=r"from the Hub \(ConnectionError: no route\).*a local copy"):
        load_rows("owner/set", "test")


def test_the_own_split_is_configurable(data_folder):
    config = replace(whole(data_folder, ["physics"]), own_split=True)
    tasks, again, other = (load_tasks(config, seed=seed) for seed in (0, 0, 1))
    assert tasks == again != other
    report = find_duplicates(tasks["train"] + tasks["test"])
    assert not report.same_prompt + report.same_stem
    assert len(tasks["train"] + tasks["test"]) == 800
