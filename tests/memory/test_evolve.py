"""One epoch's end as a pure function: a record in, one update of the memory out; no Lightning, no engine."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from epochs import make_epoch, no_behaviours
from memory_world import make_rollout, make_task

from pmd.config.schema import MemoryConfig
from pmd.errors import AlignmentError, MemoryStoreError
from pmd.memory import MemoryUpdate, ProceduralMemory, evolve_memory
from pmd.memory.behaviour_writer import Written
from pmd.memory.judge import ItemAudit
from pmd.memory.tools.transfer import export_file
from pmd.types import InsightChange

TASKS = {f"t{n}": make_task(f"t{n}", key=f"apple number{n}", answer="forty two") for n in range(3)}


def memory_in(folder: Path, **config) -> ProceduralMemory:
    keys = [task.memory_key for task in TASKS.values()]
    settings = MemoryConfig(**config)
    return ProceduralMemory(folder / "memory.sqlite", settings, keys, frozenset())


def rollouts(epoch: int = 0):
    return [replace(make_rollout(task_id, f"attempt {epoch}"), rollout_id=f"{task_id}#{epoch}") for task_id in TASKS]


def strategies(text: str, epoch: int = 0) -> list[InsightChange]:
    return [InsightChange(task_id, "strategy", text, (f"{task_id}#{epoch}",)) for task_id in TASKS]


def test_one_call_writes_all_that_an_epoch_taught_and_retrieval_follows(tmp_path):
    memory = memory_in(tmp_path)
    asked: list[list[str]] = []

    def abstraction(clusters):
        asked.extend(clusters)
        return Written(["wash apples" for _ in clusters], 7)

    record = make_epoch(memory, TASKS, rollouts(), strategies("wash it"))
    assert evolve_memory(record, memory, abstraction, policy_version=3) == MemoryUpdate(Written(["wash apples"], 7))
    store = memory.store
    assert (store.generation, memory.retriever.generation) == (1, 1)
    assert [e.rollout_id for e in store.experiences()] == ["t0#0", "t1#0", "t2#0"]
    assert [(i.task_id, i.text, i.policy_version) for i in store.insights()] == [(t, "wash it", 3) for t in TASKS]
    assert store.query("SELECT child_id, parent_id FROM links WHERE child_level = 1") == [(1, 1), (2, 2), (3, 3)]
    assert [(b.text, b.support) for b in store.behaviours()] == [("wash apples", 3)]
    assert asked == [["wash it"]]
    found = memory.retrieve(TASKS["t0"], seed=0)
    assert {(item.level, item.text) for item in found} == {(1, "wash it"), (2, "wash apples")}
    assert memory.past_success(TASKS["t1"]) == "attempt 0"
    memory.close()


def test_what_teachers_were_shown_is_logged_with_the_generation_they_read(tmp_path):
    memory = memory_in(tmp_path)
    evolve_memory(make_epoch(memory, TASKS, rollouts(), strategies("wash it")), memory, no_behaviours, 0)
    record = make_epoch(memory, TASKS, rollouts(1), epoch=1)
    shown = tuple(memory.retrieve(TASKS["t0"], seed=0))
    record.groups["g-t0"] = replace(record.groups["g-t0"], step=7, items=shown[:1], dropped=shown[1:])
    evolve_memory(record, memory, no_behaviours, 1)
    sql = "SELECT generation, step, group_id, item_id, rank, included FROM retrievals"
    assert memory.store.query(sql) == [
        (1, 7, "g-t0", item.item_id, rank, int(rank == 0)) for rank, item in enumerate(shown)
    ]
    memory.close()


@pytest.mark.parametrize("imported", [False, True])
def test_a_frozen_memory_is_written_once_or_imported_and_never_again(tmp_path, imported):
    if imported:
        source = memory_in(tmp_path / "source")
        evolve_memory(make_epoch(source, TASKS, rollouts(), strategies("wash it")), source, no_behaviours, 0)
        export_file(source.store, tmp_path / "export.jsonl")
        source.close()
    memory = memory_in(tmp_path, frozen=True, import_path=str(tmp_path / "export.jsonl") if imported else None)
    first = make_epoch(memory, TASKS, rollouts(), strategies("peel it"))
    evolve_memory(first, memory, no_behaviours, 0)
    content = list(memory.store.db.iterdump())
    assert memory.generation == 1
    assert {item.text for item in memory.store.insights()} == {"wash it" if imported else "peel it"}
    second = make_epoch(memory, TASKS, rollouts(1), strategies("cut it", 1), epoch=1)
    second.audits = (ItemAudit(0, "g", 1, 1, 1, 1, -0.5, 0.2, None, None, None),) * 3
    assert evolve_memory(second, memory, no_behaviours, 1) == MemoryUpdate()
    assert list(memory.store.db.iterdump()) == content
    memory.close()


def test_a_memory_that_is_not_frozen_is_written_in_the_second_epoch(tmp_path):
    memory = memory_in(tmp_path)
    for epoch, text in enumerate(("peel it", "cut it")):
        record = make_epoch(memory, TASKS, rollouts(epoch), strategies(text, epoch), epoch)
        evolve_memory(record, memory, no_behaviours, epoch)
    assert memory.generation == 2
    assert {item.text for item in memory.store.insights()} == {"peel it", "cut it"}
    memory.close()


def test_contexts_of_another_generation_are_refused_and_nothing_is_written(tmp_path):
    memory = memory_in(tmp_path)
    record = make_epoch(memory, TASKS, rollouts(), strategies("wash it"))
    evolve_memory(record, memory, no_behaviours, 0)
    with pytest.raises(AlignmentError, match="group g-t0 was shown memory generation=0, the memory is at 1"):
        evolve_memory(record, memory, no_behaviours, 0)
    assert memory.generation == 1
    memory.close()


def test_an_update_that_fails_in_its_last_step_leaves_nothing(tmp_path):
    memory = memory_in(tmp_path)

    def fail(clusters):
        raise RuntimeError("the engine is gone")

    record = make_epoch(memory, TASKS, rollouts(), strategies("wash it"))
    with pytest.raises(RuntimeError, match="the engine is gone"):
        evolve_memory(record, memory, fail, 0)
    assert (memory.generation, memory.store.tasks(), memory.store.insights(None)) == (0, [], [])
    evolve_memory(record, memory, no_behaviours, 0)  # the record is still of this generation
    assert memory.generation == 1
    memory.close()


def test_what_was_refused_merged_and_judged_is_counted(tmp_path):
    memory = memory_in(tmp_path)
    text = "check the units of every term before adding"
    written = [replace(change, text=text if change.task_id == "t0" else "peel it") for change in strategies("")]
    evolve_memory(make_epoch(memory, TASKS, rollouts(), written), memory, no_behaviours, 0)
    changes = [
        InsightChange("t0", "strategy", f"{text} them", ("t0#1",)),
        InsightChange("t1", "strategy", "", ("t1#1",), "retire", 999),
    ]
    record = make_epoch(memory, TASKS, rollouts(1), changes, epoch=1)
    record.audits = (ItemAudit(0, "g", 1, 2, 1, 1, -0.5, 0.2, None, None, None),) * 3
    update = evolve_memory(record, memory, no_behaviours, 1)
    assert (update.num_refused, update.num_merged) == (1, 1)
    assert update.changed_by_audits == {"retired": 2}  # both copies of the text share their evidence
    memory.close()


def test_a_held_out_task_is_refused(tmp_path):
    memory = memory_in(tmp_path)
    tasks = {"t0": make_task("t0", "validation")}
    with pytest.raises(MemoryStoreError, match="memory keeps training tasks only"):
        evolve_memory(make_epoch(memory, tasks, rollouts()[:1]), memory, no_behaviours, 0)
    memory.close()


def test_the_memory_imports_neither_lightning_nor_torch():
    script = "import sys, pmd.memory; print(sorted({'lightning', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
