"""The tiny world's language: tasks, memory lines and prompts as words, one word per token, and the way back.

`WordPrompts` is the prompt format of the tiny model: the student's prompt is the bare task; the teacher's has memory
lines before it, with a verified success or the rollout's own failure as the last line. What the policy writes is parsed
strictly: a line that is not of the language never reaches memory. Parsers return None for what is not well formed.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Literal

from pmd.errors import AlignmentError
from pmd.tasks.prompts.parsing import ParsedInsight, Reply
from pmd.tiny.world import ALL_RULES, BOX_COUNTS, COLOURS, DIGITS, NAMES, Problem
from pmd.types import ItemKind, Rollout, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
USE_KINDS = ("strategy", "pattern", "solved")  # lines that say which rule a name is bound to
NOT_KINDS = ("lesson", "failed")  # lines that say which rule it is not bound to
_GRAMMAR = (
    *("task", "plan", ";", ".", "memory", "use", "not"),
    *("verdict", "right", "wrong", "insight", "insights"),
    *USE_KINDS,
    *NOT_KINDS,
)
VOCABULARY = (PAD, BOS, EOS, *_GRAMMAR, *COLOURS, *DIGITS, *ALL_RULES, *NAMES)

LineKind = Literal["strategy", "pattern", "solved", "lesson", "failed"]


@dataclass(frozen=True, slots=True)
class Line:
    """What one memory line says about one name."""

    kind: LineKind
    name: str
    rule: str

    @property
    def text(self) -> str:
        """The line in words: `strategy use zib red>gold`, `lesson not zib red>gold`."""
        return f"{self.kind} {'use' if self.kind in USE_KINDS else 'not'} {self.name} {self.rule}"


def boxes_text(problem: Problem) -> str:
    """Return the row of boxes: `red 3 blue 5 green 1 gold 7`."""
    return " ".join(f"{c} {d}" for c, d in zip(COLOURS[: problem.boxes], problem.digits, strict=True))


def statement(problem: Problem) -> str:
    """Return the problem as it is asked: `task red 3 blue 5 green 1 gold 7 plan zib`."""
    return f"task {boxes_text(problem)} plan {problem.name}"


def memory_key(problem: Problem) -> str:
    """Return the statement without its template words."""
    return f"{boxes_text(problem)} {problem.name}"


def parse_statement(text: str) -> Problem | None:
    """Read a statement back."""
    words = text.split()
    for boxes in BOX_COUNTS:
        if len(words) == 2 * boxes + 3:
            problem = Problem(words[-1], tuple(words[2:-2:2]))
            known = problem.name in NAMES and all(digit in DIGITS for digit in problem.digits)
            return problem if known and statement(problem).split() == words else None
    return None


def solved_line(name: str, attempt: str) -> str:
    """Return a verified success as a memory line: `solved use zib red>gold ; red 3 gold 7`."""
    rule, rest = attempt.split(" ", 1)
    return f"{Line('solved', name, rule).text} {rest}"


def parse_line(text: str) -> Line | None:
    """Read a memory line of four words back; a `solved` line may go on after `;`."""
    words = text.split()
    if len(words) > 4 and (words[0] != "solved" or words[4] != ";"):
        return None
    if len(words) < 4 or words[0] not in USE_KINDS + NOT_KINDS or words[2] not in NAMES or words[3] not in ALL_RULES:
        return None
    line = Line(words[0], words[2], words[3])  # pyright: ignore[reportArgumentType]  # checked just above
    return line if line.text.split() == words[:4] else None


def stated_rule(attempt: str) -> str | None:
    """Return the rule an attempt begins with, None where it begins with anything else."""
    words = attempt.split()
    return words[0] if words and words[0] in ALL_RULES else None


def memory_text(lines: Sequence[str]) -> str:
    """Return the memory section of a prompt, with a trailing space; nothing where there are no lines."""
    return f"memory {_listed(lines)} " if lines else ""


def solve_prompt(stated: str, lines: Sequence[str] = ()) -> str:
    """Return the prompt for an attempt at a stated problem, with memory lines before it or without."""
    return f"{BOS} {memory_text(lines)}{stated}"


def reflect_prompt(stated: str, attempt: str, correct: bool) -> str:
    """Return the prompt that asks what one attempt teaches."""
    return f"{BOS} {stated} {attempt} verdict {'right' if correct else 'wrong'} insight"


def abstract_prompt(lines: Sequence[str]) -> str:
    """Return the prompt that asks for the pattern behind insights; the first line's name is what they are about."""
    return f"{BOS} insights {_listed(lines)} pattern"


def _listed(lines: Iterable[str]) -> str:
    return " ".join(f"{line} ." for line in lines)


REFLECTED_KINDS: dict[str, ItemKind] = {"strategy": "strategy", "lesson": "lesson"}
MAX_INSIGHTS = 12  # lines in one abstraction prompt; the tiny model has practised no more


class WordPrompts:
    """Prompt format of the tiny model."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
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
        return Reply([ParsedInsight(REFLECTED_KINDS[line.kind], line.text)])

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
        return self._ids(abstract_prompt([line.text for line in ordered[:MAX_INSIGHTS]]))

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
