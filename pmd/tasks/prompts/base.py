"""How a task, a memory and an attempt become token ids, and how the policy's reflections become memory lines.

Two dialects: `WordPrompts` (words.py) speaks the tiny world's language, `ChatPrompts` (chat.py) any tokenizer's chat
template with the text files beside it. Both are pure: no engine, no store.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from pmd.tasks.prompts.parsing import Reply
from pmd.types import Rollout, Task


@runtime_checkable
class PromptFormat(Protocol):
    """One dialect of prompts."""

    def student(self, task: Task) -> list[int]:
        """Return the prompt the student attempts: the task and nothing else, ever."""
        ...

    def teacher(self, task: Task, items: Sequence[str], success: str | None, failure: Rollout | None) -> list[int]:
        """Return the same task with retrieved memory lines, a verified success, or the scored rollout's own failure."""
        ...

    def placebo(self, text: str) -> str:
        """Return a memory line as long as this one that says nothing of any problem this one is about."""
        ...

    def reflection(self, task: Task, rollouts: Sequence[Rollout], known: Sequence[str] = ()) -> list[list[int]]:
        """Return the prompts, possibly none, that ask what one group of verified rollouts teaches.

        `known` are the problem's insights, which the reflection may revise by their number.
        """
        ...

    def parse_reflection(self, text: str) -> Reply:
        """Return the well-formed items of a reflection, and count what is none. Never raises."""
        ...

    def abstraction(self, insights: Sequence[str]) -> list[int]:
        """Return the prompt that asks for the pattern behind a cluster of insights; empty where there is none."""
        ...

    def parse_abstraction(self, text: str) -> str | None:
        """Return the behaviour's memory line, or None where the output is malformed. Never raises."""
        ...
