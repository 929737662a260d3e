"""The memory as every rank of a run on several devices reads it: rank 0 owns it, looks it up, and tells the others.

All ranks ask the same questions in the same order, because they work on the same batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pmd.memory import Question, ReadableMemory, Recalled
from pmd.memory.stream import MemoryUpdater
from pmd.types import Rollout

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

    def recall(self, questions: Sequence[Question]) -> list[Recalled]:
        """Return rank 0's answer to each question, told in one message."""
        return self._from_first(lambda: self._recall_own(questions))

    def _recall_own(self, questions: Sequence[Question]) -> list[Recalled]:
        assert self._own is not None
        return self._own.recall(questions)


@dataclass(frozen=True, slots=True)
class SharedUpdater:
    """Updates the memory with each batch: rank 0 does, and the others do what it asks of their engines meanwhile."""

    own: MemoryUpdater | None  # on rank 0 only
    meet: Callable[[Figures], Figures]  # returns on every rank what rank 0 gives, once rank 0 comes here

    def update(self, groups: Sequence[Sequence[Rollout]], step: int, num_steps: int, policy_version: int) -> Figures:
        """Return on every rank the metrics of rank 0's update."""
        return self.meet({} if self.own is None else self.own.update(groups, step, num_steps, policy_version))
