"""No held-out task reaches memory, not even one that is also among the training tasks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from epochs import make_epoch, no_behaviours
from memory_world import make_task

from pmd.cli import main
from pmd.config.schema import DataConfig, MemoryConfig
from pmd.errors import MemoryStoreError
from pmd.memory import ProceduralMemory, evolve_memory
from pmd.memory.embed import HashEmbedder
from pmd.memory.held_out import HeldOut
from pmd.memory.store import MemoryStore
from pmd.memory.tools.transfer import import_file
from pmd.tasks import duplicated_task_ids, load_tasks
from pmd.types import Completion, InsightChange, Message, Rollout, Verdict


def write(path, questions):
    lines = [
        json.dumps({"id": f"{path.stem}-{n}", "prompt": question, "answer": "4", "verifier": "exact"})
        for n, question in enumerate(questions)
    ]
    path.write_text("\n".join(lines) + "\n")


def attempt(task_id: str) -> tuple[Rollout, InsightChange]:
    completion = Completion((1,), (-1.0,), "4", "stop", 0)
    rollout = Rollout(f"{task_id}#0", task_id, task_id, (), completion, Verdict(1.0, True, "ok"))
    return rollout, InsightChange(task_id, "strategy", f"Think about {task_id}.", (rollout.rollout_id,))


@pytest.fixture
def tasks(tmp_path):
    write(tmp_path / "train.jsonl", ["What is two and two?", "What is one and three?", "What is four times one?"])
    write(tmp_path / "held.jsonl", ["What is two and two?", "What is nine less five?"])
    config = DataConfig(
        task="jsonl",
        path=str(tmp_path / "train.jsonl"),
        validation_path=str(tmp_path / "held.jsonl"),
        validation_share=0,
    )
    return load_tasks(config, 0)


def memory_for(tasks, folder) -> ProceduralMemory:
    keys = [task.lookup_key for task in tasks["train"]]
    return ProceduralMemory(folder / "memory.sqlite", MemoryConfig(), keys, duplicated_task_ids(tasks))


def test_a_training_task_that_is_also_held_out_is_never_written(tasks, tmp_path):
    memory = memory_for(tasks, tmp_path)
    by_id = {task.task_id: task for task in tasks["train"]}
    rollouts, changes = zip(*(attempt(task_id) for task_id in by_id), strict=True)
    evolve_memory(make_epoch(memory, by_id, rollouts, changes), memory, no_behaviours, 0)
    remembered = {insight.text for insight in memory.store.insights()}
    assert remembered == {"Think about train-1.", "Think about train-2."}
    assert "two and two" not in str(memory.snapshot())


def test_a_held_out_task_is_refused(tasks, tmp_path):
    memory = memory_for(tasks, tmp_path)
    held_out = {task.task_id: task for task in tasks["validation"] if "nine" in task.question}
    rollout, change = attempt(next(iter(held_out)))
    with pytest.raises(MemoryStoreError, match="train"):
        evolve_memory(make_epoch(memory, held_out, [rollout], [change]), memory, no_behaviours, 0)
    assert memory.store.insights() == []


QUESTION = "Which of these salts melts at the lowest temperature of all, and why?"


def world_of(folder) -> dict:
    """A training split, and a validation split with one long and one short question."""
    write(folder / "own.jsonl", ["What is one and three?", "What is four times one?"])
    write(folder / "held.jsonl", [QUESTION, "What is nine less five?"])
    own, held = str(folder / "own.jsonl"), str(folder / "held.jsonl")
    config = DataConfig(task="jsonl", path=own, validation_path=held, validation_share=0)
    return load_tasks(config, 0)


def export_of(folder, *lines: dict) -> Path:
    """An export of a good task with an insight and a behaviour, and more lines."""
    good = [task_line(1, "own-0", "What is one and three?"), insight_line(1, 1, "count on"), behaviour_line(1, [1])]
    path = folder / "given.jsonl"
    header = {"format": "pmd-memory", "version": 2}
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *good, *lines]))
    return path


def task_line(number: int, task_id: str, question: str, key: str | None = None) -> dict:
    return {
        "type": "task", "id": number, "task_id": task_id, "domain": "", "split": "train", "question": question,
        "memory_key": key or question, "content_sha": "x", "answer_sha": "x", "answer_words": 0, "answer_chars": 0,
    }  # fmt: skip


def insight_line(number: int, task_row: int, text: str) -> dict:
    return {
        "type": "insights", "id": number, "parents": [], "task_row": task_row, "kind": "strategy", "content": text,
        "policy_version": 0, "last_policy_version": 0, "support": 1, "status": "active", "version": 1,
    }  # fmt: skip


def behaviour_line(number: int, parents: list[int], text: str = "take your time") -> dict:
    return {
        "type": "behaviours", "id": number, "parents": parents, "content": text, "support": 2, "evidence_sha": "x",
        "policy_version": 0, "version": 1, "status": "active",
    }  # fmt: skip


HELD_OUT_LINES = {
    "the same id": [task_line(2, "held-1", "Some other words")],
    "the same question": [task_line(2, "stranger", "What is nine less five?")],
    "white space": [task_line(2, "stranger", "What  is\nnine less\tfive? ")],
    "the question as memory key": [task_line(2, "stranger", "Please: what is it?", "What is nine less five?")],
    "an own id with a held-out question": [task_line(2, "own-1", "What is nine less five?")],
    "an insight that quotes the question": [insight_line(2, 1, f"Asked {QUESTION} say KCl.")],
    "a behaviour that quotes the question": [behaviour_line(2, [1], f"For {QUESTION} KCl.")],
}


@pytest.mark.parametrize("name", HELD_OUT_LINES)
def test_an_import_of_a_held_out_task_is_refused_as_a_whole(name, tmp_path, open_store):
    tasks, store = world_of(tmp_path), open_store()
    path = export_of(tmp_path, *HELD_OUT_LINES[name])
    with pytest.raises(
        MemoryStoreError, match=r"held out here: line 5: .*held-out task held-\d.* Nothing was imported"
    ):
        import_file(store, path, held_out=HeldOut(tasks))
    assert store.generation == 0
    assert store.tasks() == []
    assert import_file(store, export_of(tmp_path), held_out=HeldOut(tasks))["task"] == 1


def test_a_run_refuses_an_import_and_a_store_with_held_out_tasks(tmp_path):
    tasks = world_of(tmp_path)
    path = export_of(tmp_path, *HELD_OUT_LINES["the same question"])
    arguments = (["a"], frozenset(), HeldOut(tasks))
    with pytest.raises(MemoryStoreError, match="held out here"):
        ProceduralMemory(tmp_path / "run" / "m.sqlite", MemoryConfig(import_path=str(path)), *arguments)
    memory = ProceduralMemory(tmp_path / "other" / "m.sqlite", MemoryConfig(import_path=str(path)), *arguments[:2])
    data = memory.snapshot()
    memory.close()
    with pytest.raises(MemoryStoreError, match=r"holds 1 task.* task_id=stranger: its question is that of .*held-1"):
        ProceduralMemory(memory.path, MemoryConfig(), *arguments)
    clean = ProceduralMemory(tmp_path / "clean" / "m.sqlite", MemoryConfig(), *arguments)
    with pytest.raises(MemoryStoreError, match="task_id=stranger"):
        clean.restore(data)


def test_what_training_may_remember_may_be_imported(tmp_path):
    """The run's own tasks: `X/train` beside a held-out `X`, and a stem that recurs with other options."""
    own = [
        replace(make_task("salt/train", key="salts"), messages=(Message("user", "Which salt?"),)),
        replace(make_task("twin", key="the same stem"), messages=(Message("user", "the same stem: A or B?"),)),
    ]
    held = [
        replace(make_task("salt", "test"), messages=(Message("user", "Which salt?"),), memory_key="salts"),
        replace(make_task("other", "test", "the same stem"), messages=(Message("user", "the same stem: C or D?"),)),
    ]
    held_out = HeldOut({"train": own, "validation": [], "test": held})
    for task in own:
        assert held_out.describe_task(task.task_id, task.question, task.memory_key) == ""
    for task in held:
        assert held_out.describe_task(task.task_id, task.question, task.memory_key) != ""
    assert held_out.describe_task("stranger", "the same stem: E or F?", "the same stem") != ""


def test_left_out_tasks_take_along_what_rests_on_them(tmp_path, open_store):
    store = open_store()
    path = export_of(
        tmp_path, task_line(2, "left", "q"), insight_line(2, 2, "a"), behaviour_line(2, [1, 2], "rests on both")
    )
    counts = import_file(store, path, frozenset({"left"}))
    assert counts == {"task": 1, "experiences": 0, "insights": 1, "behaviours": 1}
    assert [behaviour.text for behaviour in store.behaviours()] == ["take your time"]


def test_the_command_knows_the_held_out_tasks_of_the_run(tmp_path, capsys):
    world_of(tmp_path)
    store = tmp_path / "run" / "memory" / "memory.sqlite"
    MemoryStore.open(store, embedder=HashEmbedder(64)).close()
    config = tmp_path / "run" / "config.yaml"
    files = f"path: {tmp_path}/own.jsonl, validation_path: {tmp_path}/held.jsonl"
    text = f"data: {{task: jsonl, {files}, validation_share: 0}}\n"
    config.write_text(text)
    given = str(export_of(tmp_path, *HELD_OUT_LINES["the same question"]))
    for place in (tmp_path / "run", store):
        assert main(["memory", "import", str(place), given]) == 1
        assert "held-out task held-1" in capsys.readouterr().err
    config.rename(tmp_path / "elsewhere.yaml")
    assert main(["memory", "import", str(store), given, "--config", str(tmp_path / "elsewhere.yaml")]) == 1
    config.write_text(text.replace("held.jsonl", "gone.jsonl"))
    assert main(["memory", "import", str(store), given]) == 1
    assert "held-out tasks of" in capsys.readouterr().err
    assert main(["memory", "import", str(store), given, "--unchecked"]) == 0
    assert "not compared" in capsys.readouterr().out
