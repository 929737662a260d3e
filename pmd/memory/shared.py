"""The memory as every rank of a run on several devices reads it: rank 0 owns it, looks it up, and tells the others.

All ranks ask the same questions in the same order, because they work on the same batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pmd.memory import ReadableMemory
from pmd.memory.stream import MemoryUpdater
from pmd.types import MemoryItem, Rollout, Task

Figures = dict[str, float]


class SharedMemory:
    """Answers from rank 0's memory, on every rank."""

    def __init__(self, own: ReadableMemory | None, from_first: Callable[[Callable[[], Any]], Any]):
        """Wrap rank 0's memory.

        Args:
            own: None on the other ranks, which open no store.
            from_first: returns on every rank what a function returns on rank 0, which alone calls it.
        """
        self._own, self._from_first = own, from_first

    @property
    def generation(self) -> int:
        """How many times the memory has been updated."""
        return self._from_first(lambda: self._memory.generation)

    def retrieve(self, task: Task, *, seed: int) -> list[MemoryItem]:
        """Return at most k items for `task`, in an order drawn from `seed`."""
        return self._from_first(lambda: self._memory.retrieve(task, seed=seed))

    def past_success(self, task: Task, group_id: str = "") -> str | None:
        """Return a verified success on this task of another group than `group_id`, if there is one."""
        return self._from_first(lambda: self._memory.past_success(task, group_id))

    @property
    def _memory(self) -> ReadableMemory:
        assert self._own is not None
        return self._own


@dataclass(frozen=True, slots=True)
class SharedUpdater:
    """Updates the memory with each batch: rank 0 does, and the others do what it asks of their engines meanwhile."""

    own: MemoryUpdater | None  # on rank 0 only
    meet: Callable[[Figures], Figures]  # returns on every rank what rank 0 gives, once rank 0 comes here

    def update(self, groups: Sequence[Sequence[Rollout]], step: int, num_steps: int, policy_version: int) -> Figures:
        """Return on every rank the metrics of rank 0's update."""
        return self.meet({} if self.own is None else self.own.update(groups, step, num_steps, policy_version))
