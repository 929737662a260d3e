"""A memory that another run built, shown to a policy that is tested."""

from dataclasses import replace

import pytest

from pmd.config.schema import MemoryConfig
from pmd.errors import MemoryStoreError
from pmd.memory import Question
from pmd.memory.held_out import HeldOut
from pmd.memory.reading import opened_memory
from pmd.memory.tools.transfer import export_file

CONFIG = MemoryConfig(k=3, min_similarity=0.0)


@pytest.mark.parametrize("exported", [False, True])
def test_retrieval_from_a_store_or_an_export_leaves_it_as_it_was(grown, world, tmp_path, exported):
    path = grown.path
    if exported:
        path = tmp_path / "memory.jsonl"
        export_file(grown, path)
    before = path.read_bytes()
    task = world.task("new", world.names[0], "test")
    keys = [one.memory_key for one in world.tasks]
    shown = {}
    for k in (1, 3):
        with opened_memory(path, replace(CONFIG, k=k), keys, HeldOut({"test": [task]})) as memory:
            (recalled,) = memory.recall([Question(task, 0)])
            shown[k] = recalled.items
    assert [len(items) for items in shown.values()] == [1, 3]
    assert any(world.names[0] in item.text for item in shown[3])
    assert path.read_bytes() == before


def test_a_memory_of_a_tested_task_is_refused(grown, world):
    tested = replace(world.tasks[0], split="test")
    with (
        pytest.raises(MemoryStoreError, match=f"holds a task that is tested here, task_id={tested.task_id}"),
        opened_memory(grown.path, CONFIG, [], HeldOut({"test": [tested]})),
    ):
        pass
