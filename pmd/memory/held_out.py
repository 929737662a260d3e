"""Finds items of held-out tasks, which no memory may hold: by the task's id, its question and its memory key.

Texts are compared as `pmd.tasks.splits` compares tasks across splits: white space is normalized. A task of the run's
own training split is judged as training judges it, by its question alone, because the same stem with other options may
recur there.
"""

from collections.abc import Mapping, Sequence

from pmd.tasks.splits import TRAIN_SUFFIX, prompt_of, stem_of
from pmd.types import Split, Task

QUOTED_WORDS = 8  # a held-out question of at least this many words is searched for inside items too


class HeldOut:
    """The held-out tasks of a run."""

    def __init__(self, tasks: Mapping[Split, Sequence[Task]]):
        """Take all splits of the run; the training tasks tell which tasks are its own."""
        self._train = {task.task_id: prompt_of(task) for task in tasks.get("train", ())}
        held_out = [task for split, part in tasks.items() if split != "train" for task in part]
        self._ids = {task.task_id for task in held_out}
        self._prompts = {prompt_of(task): task.task_id for task in reversed(held_out)}
        self._stems = {stem_of(task): task.task_id for task in reversed(held_out)}
        own = set(self._train.values()) | {stem_of(task) for task in tasks.get("train", ())}
        self._quotable: dict[tuple[str, ...], list[tuple[list[str], str]]] = {}
        for text, task_id in {**self._stems, **self._prompts}.items():
            words = text.split()
            if text not in own and len(words) >= QUOTED_WORDS:
                self._quotable.setdefault(tuple(words[:QUOTED_WORDS]), []).append((words, task_id))

    def describe_task(self, task_id: str, question: str, memory_key: str) -> str:
        """Return in words which held-out task this is; empty if it is none."""
        question, memory_key = (" ".join(text.split()) for text in (question, memory_key or question))
        is_own = self._train.get(task_id) == question
        if not is_own and task_id in self._ids:
            return f"it is the held-out task {task_id}"
        for what, known, text in (("question", self._prompts, question), ("memory key", self._stems, memory_key)):
            other = known.get(text)
            if other is not None and task_id != other + TRAIN_SUFFIX and not (is_own and what == "memory key"):
                return f"its {what} is that of the held-out task {other}"
        return ""

    def describe_text(self, text: str) -> str:
        """Return in words which held-out question an item's text quotes or is; empty if none."""
        words = text.split()
        for start in range(len(words) - QUOTED_WORDS + 1):
            for quoted, task_id in self._quotable.get(tuple(words[start : start + QUOTED_WORDS]), ()):
                if words[start : start + len(quoted)] == quoted:
                    return f"its text quotes the held-out task {task_id}"
        return ""
