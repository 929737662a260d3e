"""The prompt format: renders tasks, memory and attempts to token ids, and parses reflections into memory lines.

There are two: `WordPrompts` (words.py) for the tiny world's language, `ChatPrompts` (chat.py) for any tokenizer with a
chat template, using the text files in `templates/`. Both are pure functions of their arguments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pmd.tasks.prompts.parsing import Reply
from pmd.types import MemoryItem, Rollout, Task


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of a group a reflection prompt shows."""

    attempts: int = 4  # of each outcome; more would only lengthen the prompt
    characters: int | None = None  # of an attempt, and of its feedback; longer ones are cut in the middle


WHOLE = Extent()


@runtime_checkable
class PromptFormat(Protocol):
    """Renders every prompt of a run and parses what the policy writes."""

    def student(self, task: Task) -> list[int]:
        """Return the student's prompt: always the task and nothing else."""
        ...

    def teacher(
        self,
        task: Task,
        items: Sequence[str],
        success: str | None,
        failure: Rollout | None,
        show_attempt: bool = True,
    ) -> list[int]:
        """Return the task with retrieved memory lines, a verified success, or feedback on the rollout's failure.

        With `show_attempt`, the failed attempt stands before its feedback.
        """
        ...

    def memory_line(self, item: MemoryItem) -> str:
        """Return an item as it stands in a prompt: its text, unless the format says more."""
        return item.text

    def placebo(self, text: str) -> str:
        """Return a memory line of the same length that carries no information about the task."""
        ...

    def reflection(
        self, task: Task, rollouts: Sequence[Rollout], known: Sequence[str] = (), extent: Extent = WHOLE
    ) -> list[list[int]]:
        """Return the prompts that ask what one group of verified rollouts teaches; none if there is nothing to say.

        `known` are the task's existing insights, which the reflection may revise by number.
        """
        ...

    def parse_reflection(self, text: str) -> Reply:
        """Return the well-formed items of a reflection and the number of malformed ones. Never raises."""
        ...

    def abstraction_text(self, insights: Sequence[str]) -> str:
        """Return the prompt that asks for the pattern behind a cluster of insights as text; empty if there is none."""
        ...

    def abstraction(self, insights: Sequence[str]) -> list[int]:
        """Return the ids of the same prompt for the policy."""
        ...

    def parse_abstraction(self, text: str) -> str | None:
        """Return the behaviour's memory line, or None if the output is malformed. Never raises."""
        ...
