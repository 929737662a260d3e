"""Prompts for chat models: the tokenizer's own chat template around the text files in `chat_text/`.

Enters: tasks, memory lines, attempts. Leaves: token ids; and memory lines parsed from the policy's JSON. Thinking is
off in every prompt and stripped from every attempt that is shown. The wording is our choice; the paper's prompts are
not public.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from pmd.types import Message, ProcedureKind, Rollout, Task

TEXT = Path(__file__).parent / "chat_text"
KINDS: tuple[ProcedureKind, ...] = ("strategy", "lesson", "contrast")
MAX_ATTEMPTS_SHOWN = 4  # per outcome; more only lengthens the prompt
MAX_ITEM_CHARACTERS = 1200  # an item longer than this is a transcript, not an insight
THINKING = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
FENCE = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


class ChatPrompts:
    """Prompt format of instruction-tuned models."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        names = ("teacher", "memory", "success", "failure", "reflection", "attempt", "abstraction", "placebo")
        self.text = {name: (TEXT / f"{name}.txt").read_text(encoding="utf-8") for name in names}

    def student(self, task: Task) -> list[int]:
        """Return the task's messages under the chat template."""
        return self._ids(task.messages)

    def teacher(self, task: Task, items: Sequence[str], success: str | None, failure: Rollout | None) -> list[int]:
        """Return the task with the sections that apply in its last user message; the task alone where none does."""
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
        return self._ids(messages)

    def placebo(self, text: str) -> str:
        """Return neutral words, as many tokens as the text has."""
        wanted = len(self._tokens(text))
        words = self.text["placebo"].split()
        words *= 1 + wanted // len(words)
        first, last = 1, len(words)  # fewest and most words; the number of tokens grows with them
        while first < last:
            middle = (first + last) // 2
            first, last = (
                (first, middle) if len(self._tokens(" ".join(words[:middle]))) >= wanted else (middle + 1, last)
            )
        return " ".join(words[:first])

    def _tokens(self, text: str) -> list[int]:
        return cast(list[int], self.tokenizer.encode(text, add_special_tokens=False))

    def reflection(self, task: Task, rollouts: Sequence[Rollout]) -> list[list[int]]:
        """Return one prompt per group. An all-failed group without any feedback teaches nothing: no prompt."""
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
        prompt = self._fill("reflection", question=task.question, attempts=attempts, outcome=outcome)
        return [self._ids([Message("user", prompt.rstrip("\n"))])]

    def parse_reflection(self, text: str) -> list[tuple[ProcedureKind, str]]:
        """Return each well-formed item; one malformed item does not cost the others."""
        lines: list[tuple[ProcedureKind, str]] = []
        for item in _json_objects(strip_thinking(text)):
            line = _line(item)
            if line is not None and item.get("kind") in KINDS:
                lines.append((cast(ProcedureKind, item["kind"]), line))
        return lines

    def abstraction(self, insights: Sequence[str]) -> list[int]:
        """Return the prompt for one cluster."""
        listed = "\n".join(f"- {insight}" for insight in insights)
        return self._ids([Message("user", self._fill("abstraction", insights=listed).rstrip("\n"))])

    def parse_abstraction(self, text: str) -> str | None:
        """Return the first well-formed item."""
        return next((line for item in _json_objects(strip_thinking(text)) if (line := _line(item))), None)

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        chat = [{"role": message.role, "content": message.content} for message in messages]
        ids = self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=False, enable_thinking=False
        )
        return [int(i) for i in cast(list[int], ids)]

    def _fill(self, name: str, **values: str) -> str:
        """Fill a text file's {fields}; braces inside the values stay as they are."""
        return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], self.text[name])


def strip_thinking(text: str) -> str:
    """Remove <think> blocks, closed or not, and surrounding white space."""
    return THINKING.sub("", text).strip()


def _distinct(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Keep the first rollout of each text."""
    return list({rollout.completion.text: rollout for rollout in reversed(rollouts)}.values())[::-1]


def _json_objects(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects in the last fence, or in the whole text where there is no fence."""
    fences = FENCE.findall(text)
    source = fences[-1] if fences else text
    decoder, found, start = json.JSONDecoder(), [], 0
    while (start := source.find("{", start)) >= 0:
        try:
            value, end = decoder.raw_decode(source, start)
        except (json.JSONDecodeError, RecursionError):
            start += 1
            continue
        found.append(value)
        start = end
    return [value for value in found if isinstance(value, dict)]


def _line(item: dict[str, Any]) -> str | None:
    """Return `title: content` on one line, None where either is missing or overlong."""
    title, content = item.get("title"), item.get("content")
    if not (isinstance(title, str) and isinstance(content, str) and title.strip() and content.strip()):
        return None
    line = " ".join(f"{title.strip()}: {content.strip()}".split())
    return line if len(line) <= MAX_ITEM_CHARACTERS else None
