"""No held-out task reaches memory, not even one that is also among the training tasks."""

import json

import pytest
from epochs import make_epoch, no_behaviours

from pmd.config.schema import DataConfig, MemoryConfig
from pmd.errors import MemoryStoreError
from pmd.memory import ProceduralMemory, evolve_memory
from pmd.tasks import duplicated_task_ids, load_tasks
from pmd.types import Completion, InsightChange, Rollout, Verdict


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
        task="jsonl", path=str(tmp_path / "train.jsonl"), validation_path=str(tmp_path / "held.jsonl")
    )  # fmt: skip
    return load_tasks(config, 0)


def memory_for(tasks, folder) -> ProceduralMemory:
    keys = [task.memory_key or task.question for task in tasks["train"]]
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
