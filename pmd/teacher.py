"""What the teacher sees: retrieved memory, a verified success, or the rollout's own failure (paper section on the
memory-conditioned self-teacher; SDPO for the sibling context).

`ContextBuilder` returns one prompt per rollout, in token ids, with a record of what went into it. The completion's ids
are appended elsewhere, unchanged, so that teacher and student score the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from pmd.config.schema import TeacherConfig
from pmd.tasks.prompts.base import PromptFormat
from pmd.tasks.thinking import strip_thinking
from pmd.types import MemoryItem, Rollout, Task


@dataclass(frozen=True, slots=True)
class TeacherContext:
    """The teacher's prompt for one rollout, and what it shows besides the task."""

    rollout_id: str
    prompt_ids: tuple[int, ...]
    items: tuple[MemoryItem, ...] = ()
    success: str | None = None  # text of the verified success shown, of a sibling or of an earlier epoch
    shows_failure: bool = False  # the feedback on the rollout's own failure, and with `failed_attempt` the failure
    dropped: tuple[MemoryItem, ...] = ()  # memory items left out because the prompt was full
    attempt_dropped: bool = False  # a success or failure was left out because it alone made the prompt too long
    memory_generation: int = 0

    @property
    def num_dropped(self) -> int:
        """How many memory items were left out."""
        return len(self.dropped)

    @property
    def shows_anything(self) -> bool:
        """Whether the teacher knows more than the student did."""
        return bool(self.items) or self.success is not None or self.shows_failure


class ContextBuilder:
    """Builds the teacher's prompts of one run, within the run's budgets."""

    def __init__(self, prompts: PromptFormat, config: TeacherConfig, max_memory_tokens: int):
        self.prompts = prompts
        self.config = config
        self.max_memory_tokens = max_memory_tokens

    def build(
        self,
        task: Task,
        group: Sequence[Rollout],
        items: Sequence[MemoryItem],
        past_success: str | None,
        generation: int,
        random: Random,
    ) -> list[TeacherContext]:
        """Return one context per rollout of the group, in the group's order.

        `past_success` is a verified completion of the same task from an earlier epoch; it is used if no sibling
        succeeded. The rollout's own failure is shown only if there is no success to show and the verifier gave feedback
        on it (SDPO's release: feedback only where there is any).
        """
        config, contexts = self.config, []
        for rollout in group:
            success, failure = None, None
            if config.context in ("sibling", "both"):
                success = _sibling_success(rollout, group, random)
                if success is None and config.context == "both":
                    success = past_success
                if success is None and config.feedback and _has_feedback(rollout):
                    failure = rollout
            shown = _without_attempt(items, rollout, success) if config.context in ("memory", "both") else ()
            wanted = TeacherContext(rollout.rollout_id, (), shown, success, memory_generation=generation)
            contexts.append(self._fit(task, wanted, failure))
        return contexts

    def memory_prompt(self, task: Task, items: Sequence[MemoryItem]) -> tuple[int, ...]:
        """Return a prompt with memory but no attempt, within the teacher's length limits."""
        return self._fit(task, TeacherContext("", (), tuple(items)), None).prompt_ids

    def _fit(self, task: Task, wanted: TeacherContext, failure: Rollout | None) -> TeacherContext:
        """Render the prompt, dropping an attempt that is too long by itself, then the least similar memory items.

        Items are dropped whole, never truncated: a truncated item can say the opposite of what it meant.
        """
        success, kept, too_long, show_attempt = wanted.success, list(wanted.items), False, self.config.failed_attempt
        prompt_ids = without_memory = self.prompts.teacher(task, [], success, failure, show_attempt)
        if failure is not None and without_memory == self.prompts.student(task):
            failure = None  # the format has no words for it
        if len(without_memory) > self.config.max_prompt_tokens:
            too_long = success is not None or failure is not None
            success, failure = None, None
            prompt_ids = without_memory = self.prompts.student(task)
        limit = min(self.config.max_prompt_tokens, len(without_memory) + self.max_memory_tokens)
        while kept:
            lines = [self.prompts.memory_line(item) for item in kept]
            prompt_ids = self.prompts.teacher(task, lines, success, failure, show_attempt)
            if len(prompt_ids) <= limit:
                break
            kept.remove(min(kept, key=lambda item: item.similarity))
            prompt_ids = without_memory
        return replace(
            wanted,
            prompt_ids=tuple(prompt_ids),
            items=tuple(kept),
            success=success,
            shows_failure=failure is not None,
            dropped=tuple(item for item in wanted.items if item not in kept),
            attempt_dropped=too_long,
        )


def _has_feedback(rollout: Rollout) -> bool:
    """Whether the rollout failed and its verifier said why."""
    verdict = rollout.verdict
    return verdict.scored and not verdict.correct and bool(verdict.feedback.strip())


def _sibling_success(rollout: Rollout, group: Sequence[Rollout], random: Random) -> str | None:
    """Return another verified success of the same group, never the scored rollout itself (as SDPO does)."""
    successes = [r for r in group if r.verdict.correct and r.rollout_id != rollout.rollout_id]
    return random.choice(successes).completion.text if successes else None


def _without_attempt(items: Sequence[MemoryItem], rollout: Rollout, success: str | None) -> tuple[MemoryItem, ...]:
    """Leave out attempts that are the scored rollout's own, word for word, or the success that is shown anyway."""
    if all(item.level > 0 for item in items):
        return tuple(items)
    texts = {strip_thinking(text) for text in (rollout.completion.text, success) if text is not None}
    return tuple(item for item in items if item.level > 0 or item.text not in texts)
