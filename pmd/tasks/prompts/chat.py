"""Prompts for chat models: the tokenizer's own chat template around the text files in `templates/`.

Thinking is turned off in every prompt and stripped from every attempt that is shown. Control tokens spelled in tasks,
attempts, memory or feedback are encoded as text (encoding.py). The wording is our choice; the paper's prompts are not
public.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pmd.tasks.prompts.encoding import ChatEncoder
from pmd.tasks.prompts.parsing import Reply, parse_items, parse_line, strip_thinking
from pmd.types import Message, Rollout, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT = Path(__file__).parent / "templates"
MAX_ATTEMPTS_SHOWN = 4  # per outcome; more would only lengthen the prompt


class ChatPrompts:
    """Prompt format of instruction-tuned models."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self.encoder = ChatEncoder(tokenizer)
        names = ("teacher", "memory", "success", "failure", "reflection", "attempt", "abstraction", "placebo")
        names += ("known", "revision")
        self.text = {name: (TEXT / f"{name}.txt").read_text(encoding="utf-8") for name in names}

    def student(self, task: Task) -> list[int]:
        """Return the task's messages under the chat template."""
        return self.encoder.ids(task.messages)

    def teacher(self, task: Task, items: Sequence[str], success: str | None, failure: Rollout | None) -> list[int]:
        """Return the task with the applicable sections in its last user message, or the bare task if there are none."""
        sections = ""
        if items:
            sections += self._fill("memory", items="\n".join(f"- {item}" for item in items))
        if success is not None:
            sections += self._fill("success", success=strip_thinking(success))
        if failure is not None:
            attempt, feedback = strip_thinking(failure.completion.text), failure.verdict.feedback
            sections += self._fill("failure", attempt=attempt, feedback=feedback or "It is wrong.")
        if not sections:
            return self.student(task)
        last = max(i for i, message in enumerate(task.messages) if message.role == "user")
        question = self._fill("teacher", question=task.question, sections=sections).rstrip("\n")
        messages = [Message("user", question) if i == last else m for i, m in enumerate(task.messages)]
        return self.encoder.ids(messages)

    def placebo(self, text: str) -> str:
        """Return neutral text with as many tokens as `text`."""
        wanted = len(self._tokens(text))
        words = self.text["placebo"].split()
        words *= 1 + wanted // len(words)
        first, last = 1, len(words)  # binary search: the token count grows with the word count
        while first < last:
            middle = (first + last) // 2
            first, last = (
                (first, middle) if len(self._tokens(" ".join(words[:middle]))) >= wanted else (middle + 1, last)
            )
        return " ".join(words[:first])

    def _tokens(self, text: str) -> list[int]:
        return cast(list[int], self.tokenizer.encode(text, add_special_tokens=False))

    def reflection(self, task: Task, rollouts: Sequence[Rollout], known: Sequence[str] = ()) -> list[list[int]]:
        """Return one prompt per group, or none if every attempt failed and none got feedback."""
        right = [r for r in rollouts if r.verdict.correct]
        wrong = [r for r in rollouts if r.verdict.scored and not r.verdict.correct]
        if not right and not any(r.verdict.feedback for r in wrong):
            return []
        outcome = "mixed" if right and wrong else "correct" if right else "wrong"
        shown = _distinct(right)[:MAX_ATTEMPTS_SHOWN] + _distinct(wrong)[:MAX_ATTEMPTS_SHOWN]
        attempts = "\n".join(
            self._fill(
                "attempt",
                number=str(number),
                verdict="correct" if rollout.verdict.correct else "wrong",
                text=strip_thinking(rollout.completion.text),
                feedback=rollout.verdict.feedback,
            )
            for number, rollout in enumerate(shown, start=1)
        )
        if known:
            listed = "\n".join(f"[{number}] {text}" for number, text in enumerate(known, start=1))
            attempts += "\n" + self._fill("known", known=listed).rstrip("\n")
        prompt = self._fill("reflection", question=task.question, attempts=attempts, outcome=outcome).rstrip("\n")
        if known:
            prompt += self._fill("revision").rstrip("\n")
        return [self.encoder.ids([Message("user", prompt)])]

    def parse_reflection(self, text: str) -> Reply:
        """Return the well-formed items; a malformed one does not affect the others."""
        return parse_items(text)

    def abstraction(self, insights: Sequence[str]) -> list[int]:
        """Return the prompt for one cluster."""
        listed = "\n".join(f"- {insight}" for insight in insights)
        return self.encoder.ids([Message("user", self._fill("abstraction", insights=listed).rstrip("\n"))])

    def parse_abstraction(self, text: str) -> str | None:
        """Return the first well-formed item."""
        return parse_line(text)

    def _fill(self, name: str, **values: str) -> str:
        """Fill the {fields} of a template; braces inside the values are left as they are."""
        return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], self.text[name])


def _distinct(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Keep the first rollout of each text."""
    return list({rollout.completion.text: rollout for rollout in reversed(rollouts)}.values())[::-1]
