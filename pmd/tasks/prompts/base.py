"""The prompt format: renders tasks, memory and attempts to token ids, and parses reflections into memory lines.

There are two: `WordPrompts` (words.py) for the tiny world's language, `ChatPrompts` (chat.py) for any tokenizer with a
chat template, using the text files in `templates/`. Both are pure functions of their arguments.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from pmd.tasks.prompts.parsing import Reply
from pmd.types import MemoryItem, Rollout, Task


@runtime_checkable
class PromptFormat(Protocol):
    """Renders every prompt of a run and parses what the policy writes."""

    def student(self, task: Task) -> list[int]:
        """Return the student's prompt: always the task and nothing else."""
        ...

    def teacher(self, task: Task, items: Sequence[str], success: str | None, failure: Rollout | None) -> list[int]:
        """Return the task with retrieved memory lines, a verified success, or the scored rollout's own failure."""
        ...

    def memory_line(self, item: MemoryItem) -> str:
        """Return an item as it stands in a prompt: its text, unless the format says more."""
        return item.text

    def placebo(self, text: str) -> str:
        """Return a memory line of the same length that carries no information about the task."""
        ...

    def reflection(self, task: Task, rollouts: Sequence[Rollout], known: Sequence[str] = ()) -> list[list[int]]:
        """Return the prompts, possibly none, that ask what one group of verified rollouts teaches.

        `known` are the task's existing insights, which the reflection may revise by number.
        """
        ...

    def parse_reflection(self, text: str) -> Reply:
        """Return the well-formed items of a reflection and the number of malformed ones. Never raises."""
        ...

    def abstraction(self, insights: Sequence[str]) -> list[int]:
        """Return the prompt that asks for the pattern behind a cluster of insights; empty if there is none."""
        ...

    def parse_abstraction(self, text: str) -> str | None:
        """Return the behaviour's memory line, or None if the output is malformed. Never raises."""
        ...
