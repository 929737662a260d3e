"""Prompts of the tiny world: tasks, memory lines and attempts in, token ids out; and memory lines read back.

The student's prompt is the bare problem. The teacher's has memory lines before it, in the order given; a verified
success or the rollout's own failure is the last line. What the policy writes is parsed strictly: a line that is not
of the language never reaches memory.
"""

from collections import Counter
from collections.abc import Sequence
from random import Random

from transformers import PreTrainedTokenizerBase

from pmd.errors import AlignmentError
from pmd.prompts.parse import Reflected, Reply
from pmd.tiny.language import (
    Line,
    abstract_prompt,
    parse_line,
    parse_statement,
    reflect_prompt,
    solve_prompt,
    solved_line,
    stated_rule,
)
from pmd.tiny.world import NAMES
from pmd.types import ProcedureKind, Rollout, Task

REFLECTED_KINDS: dict[str, ProcedureKind] = {"strategy": "strategy", "lesson": "lesson"}
MOST_INSIGHTS = 12  # lines in one abstraction prompt; the tiny model has practised no more


class WordPrompts:
    """Prompt format of the tiny model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.known_words = frozenset(tokenizer.get_vocab())
        self.special_words = frozenset(tokenizer.all_special_tokens)

    def student(self, task: Task) -> list[int]:
        """Return `<bos> task red 3 blue 5 green 1 gold 7 plan zib`."""
        return self._ids(solve_prompt(task.question))

    def teacher(self, task: Task, items: Sequence[str], success: str | None, failure: Rollout | None) -> list[int]:
        """Return the task behind `memory LINE . LINE .`; the task alone where there is no line."""
        lines = list(items)
        if success is not None and stated_rule(success) is not None:
            lines.append(solved_line(_name_in(task), self._without_specials(success)))
        if failure is not None and (rule := stated_rule(failure.completion.text)) is not None:
            lines.append(Line("failed", _name_in(task), rule).text)
        return self._ids(solve_prompt(task.question, lines))

    def placebo(self, text: str) -> str:
        """Return the same line about another name: the same words are in the prompt, and nothing is bound."""
        words = text.split()
        names = [name for name in NAMES if name not in words]
        draw = Random(text)
        return " ".join(draw.choice(names) if word in NAMES else word for word in words)

    def reflection(self, task: Task, rollouts: Sequence[Rollout], known: Sequence[str] = ()) -> list[list[int]]:
        """Return one prompt per distinct (stated rule, correct); attempts that state no rule teach nothing.

        The language has no words for revising what is known.
        """
        prompts: dict[tuple[str, bool], str] = {}
        for rollout in rollouts:
            attempt, verdict = self._without_specials(rollout.completion.text), rollout.verdict
            rule = stated_rule(attempt)
            if rule is not None and verdict.scored:
                prompt = reflect_prompt(task.question, attempt, verdict.correct)
                prompts.setdefault((rule, verdict.correct), prompt)
        return [self._ids(prompt) for prompt in prompts.values()]

    def parse_reflection(self, text: str) -> Reply:
        """Return the strategy or lesson line, if the text is exactly one."""
        line = parse_line(self._without_specials(text))
        if line is None or line.kind not in REFLECTED_KINDS:
            return Reply([])
        return Reply([Reflected(REFLECTED_KINDS[line.kind], line.text)])

    def abstraction(self, insights: Sequence[str]) -> list[int]:
        """Return `<bos> insights LINE . LINE . pattern`; empty where no strategy is among the lines.

        The lines of the name with the most strategies come first: the model writes about the first line's name.
        """
        lines = [line for insight in insights if (line := parse_line(insight)) is not None]
        strategies = Counter(line.name for line in lines if line.kind == "strategy")
        if not strategies:
            return []
        name = strategies.most_common(1)[0][0]
        ordered = sorted(dict.fromkeys(lines), key=lambda line: (line.name != name, line.kind != "strategy"))
        return self._ids(abstract_prompt([line.text for line in ordered[:MOST_INSIGHTS]]))

    def parse_abstraction(self, text: str) -> str | None:
        """Return `pattern use zib red>gold` if the text is `use zib red>gold`."""
        line = parse_line(f"pattern {self._without_specials(text)}")
        return line.text if line is not None else None

    def _ids(self, text: str) -> list[int]:
        unknown = [word for word in text.split() if word not in self.known_words]
        if unknown:
            raise AlignmentError(
                f"the tiny world has no word {unknown[0]!r} (in {text[:80]!r}); "
                "use model.prompts: chat for text that is not of the tiny world."
            )
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=False)]

    def _without_specials(self, text: str) -> str:
        return " ".join(word for word in text.split() if word not in self.special_words)


def _name_in(task: Task) -> str:
    """Return the name whose plan the task asks for."""
    problem = parse_statement(task.question)
    if problem is None:
        raise AlignmentError(f"task {task.task_id} is not a problem of the tiny world; use model.prompts: chat.")
    return problem.name
