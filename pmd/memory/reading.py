"""Opens a memory that another run built, to show it to a policy that is tested: the transfer protocol.

Nothing is written to the store. A store keeps its own embedder; an export gets the configuration's.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pmd.config.schema import MemoryConfig
from pmd.errors import MemoryStoreError
from pmd.memory import ProceduralMemory, Question, Recalled
from pmd.memory.held_out import HeldOut
from pmd.memory.index import TaskIndex
from pmd.memory.retrieve import Retriever
from pmd.memory.store import MemoryStore


@dataclass(frozen=True, slots=True)
class StoredMemory:
    """A memory that is only read."""

    retriever: Retriever

    def recall(self, questions: Sequence[Question]) -> list[Recalled]:
        """Return the items for each task; past successes stay with the run that made them."""
        found = [self.retriever.retrieve(q.task.lookup_key, seed=q.seed, task_id=q.task.task_id) for q in questions]
        return [Recalled(tuple(items), generation=self.retriever.generation) for items in found]


@contextmanager
def opened_memory(
    path: Path, config: MemoryConfig, keys: Sequence[str], held_out: HeldOut
) -> Iterator[StoredMemory | ProceduralMemory]:
    """Open the memory at `path` for retrieval as `config` says.

    Args:
        keys: memory keys that the hashing embedder is fitted to, for an export.
        held_out: the test tasks, none of which the memory may hold.

    Raises:
        MemoryStoreError: it cannot be used, or holds a test task.
    """
    if path.suffix == ".jsonl":
        with tempfile.TemporaryDirectory() as folder:
            imported = replace(config, import_path=str(path))
            memory = ProceduralMemory(Path(folder, "memory.sqlite"), imported, keys, frozenset(), held_out)
            yield memory
            memory.close()
        return
    with MemoryStore.open(path, config=config, read_only=True) as store:
        for task in store.tasks():
            if reason := held_out.describe_task(task.task_id, task.question, task.memory_key):
                raise MemoryStoreError(
                    f"memory store={path} holds a task that is tested here, task_id={task.task_id}: {reason}. Test on "
                    "tasks that the memory has not seen."
                )
        yield StoredMemory(Retriever(store, TaskIndex.open(store), config))
