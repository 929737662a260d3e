"""The tiny world's language: renders puzzles, memory lines and prompts as words, one token each, and parses them back.

`WordPrompts` is the prompt format of the tiny model. The student's prompt is the bare task; the teacher's has memory
lines before it, the last of which is a verified success or the rollout's own failure. Parsing is strict: a line that is
not in the language never reaches memory. Parsers return None for malformed text.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Literal

from pmd.errors import AlignmentError
from pmd.tasks.prompts.base import WHOLE, Extent
from pmd.tasks.prompts.parsing import ParsedInsight, Reply
from pmd.tiny.world import ALL_RULES, BOX_COUNTS, COLOURS, DIGITS, NAMES, Puzzle
from pmd.types import ItemKind, MemoryItem, Rollout, Task

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
    """A memory line: what it says about one name."""

    kind: LineKind
    name: str
    rule: str

    @property
    def text(self) -> str:
        """The line in words: `strategy use zib red>gold`, `lesson not zib red>gold`."""
        return f"{self.kind} {'use' if self.kind in USE_KINDS else 'not'} {self.name} {self.rule}"


def boxes_text(puzzle: Puzzle) -> str:
    """Return the row of boxes: `red 3 blue 5 green 1 gold 7`."""
    return " ".join(f"{c} {d}" for c, d in zip(COLOURS[: puzzle.boxes], puzzle.digits, strict=True))


def statement(puzzle: Puzzle) -> str:
    """Return the question: `task red 3 blue 5 green 1 gold 7 plan zib`."""
    return f"task {boxes_text(puzzle)} plan {puzzle.name}"


def memory_key(puzzle: Puzzle) -> str:
    """Return the statement without the words `task` and `plan`."""
    return f"{boxes_text(puzzle)} {puzzle.name}"


def parse_statement(text: str) -> Puzzle | None:
    """Parse a statement."""
    words = text.split()
    for boxes in BOX_COUNTS:
        if len(words) == 2 * boxes + 3:
            puzzle = Puzzle(words[-1], tuple(words[2:-2:2]))
            known = puzzle.name in NAMES and all(digit in DIGITS for digit in puzzle.digits)
            return puzzle if known and statement(puzzle).split() == words else None
    return None


def solved_line(name: str, attempt: str) -> str:
    """Return a verified success as a memory line: `solved use zib red>gold ; red 3 gold 7`."""
    rule, rest = attempt.split(" ", 1)
    return f"{Line('solved', name, rule).text} {rest}"


def parse_line(text: str) -> Line | None:
    """Parse a memory line of four words; a `solved` line may continue after `;`."""
    words = text.split()
    if len(words) > 4 and (words[0] != "solved" or words[4] != ";"):
        return None
    if len(words) < 4 or words[0] not in USE_KINDS + NOT_KINDS or words[2] not in NAMES or words[3] not in ALL_RULES:
        return None
    line = Line(words[0], words[2], words[3])  # pyright: ignore[reportArgumentType]  # checked above
    return line if line.text.split() == words[:4] else None


def stated_rule(attempt: str) -> str | None:
    """Return the rule that an attempt starts with, or None."""
    words = attempt.split()
    return words[0] if words and words[0] in ALL_RULES else None


def memory_text(lines: Sequence[str]) -> str:
    """Return the memory section of a prompt with a trailing space, or an empty string if there are no lines."""
    return f"memory {_listed(lines)} " if lines else ""


def solve_prompt(stated: str, lines: Sequence[str] = ()) -> str:
    """Return the prompt for an attempt at a stated puzzle, optionally preceded by memory lines."""
    return f"{BOS} {memory_text(lines)}{stated}"


def reflect_prompt(stated: str, attempt: str, correct: bool) -> str:
    """Return the prompt that asks what one attempt teaches."""
    return f"{BOS} {stated} {attempt} verdict {'right' if correct else 'wrong'} insight"


def abstract_prompt(lines: Sequence[str]) -> str:
    """Return the prompt that asks for the pattern behind insights; the pattern is about the first line's name."""
    return f"{BOS} insights {_listed(lines)} pattern"


def _listed(lines: Iterable[str]) -> str:
    return " ".join(f"{line} ." for line in lines)


REFLECTED_KINDS: dict[str, ItemKind] = {"strategy": "strategy", "lesson": "lesson"}
MAX_INSIGHTS = 12  # lines in one abstraction prompt; the tiny model was trained on no more


class WordPrompts:
    """Prompt format of the tiny model."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        self.known_words = frozenset(tokenizer.get_vocab())
        self.special_words = frozenset(tokenizer.all_special_tokens)

    def student(self, task: Task) -> list[int]:
        """Return `<bos> task red 3 blue 5 green 1 gold 7 plan zib`."""
        return self._ids(solve_prompt(task.question))

    def teacher(
        self,
        task: Task,
        items: Sequence[str],
        success: str | None,
        failure: Rollout | None,
        show_attempt: bool = True,
    ) -> list[int]:
        """Return `<bos> memory LINE . LINE . TASK`, or the bare task if there are no lines.

        Of a failure, the language can state the rule that was tried, but no feedback.
        """
        lines = [self._without_specials(item) for item in items]
        if success is not None and stated_rule(success) is not None:
            lines.append(solved_line(_name_in(task), self._without_specials(success)))
        if failure is not None and show_attempt and (rule := stated_rule(failure.completion.text)) is not None:
            lines.append(Line("failed", _name_in(task), rule).text)
        return self._ids(solve_prompt(task.question, lines))

    def memory_line(self, item: MemoryItem) -> str:
        """Return the item's text: the language has no numbers to say how sure an insight is."""
        return item.text

    def placebo(self, text: str) -> str:
        """Return the same line about another name, so that it says nothing about this one."""
        words = text.split()
        names = [name for name in NAMES if name not in words]
        draw = Random(text)
        return " ".join(draw.choice(names) if word in NAMES else word for word in words)

    def reflection(
        self, task: Task, rollouts: Sequence[Rollout], known: Sequence[str] = (), extent: Extent = WHOLE
    ) -> list[list[int]]:
        """Return one prompt per distinct (stated rule, correct); attempts without a rule teach nothing.

        `known` is ignored: the language cannot express revisions. So is `extent`: each prompt shows one short attempt.
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
        """Return the line if the text is exactly one strategy or lesson."""
        line = parse_line(self._without_specials(text))
        if line is None or line.kind not in REFLECTED_KINDS:
            return Reply([])
        return Reply([ParsedInsight(REFLECTED_KINDS[line.kind], line.text)])

    def abstraction(self, insights: Sequence[str]) -> list[int]:
        """Return the ids of `abstraction_text`."""
        return self._ids(self.abstraction_text(insights))

    def abstraction_text(self, insights: Sequence[str]) -> str:
        """Return `<bos> insights LINE . LINE . pattern`, or an empty prompt if no line is a strategy.

        The lines about the name with the most strategies come first, because the model writes about the first name.
        """
        lines = [line for insight in insights if (line := parse_line(insight)) is not None]
        strategies = Counter(line.name for line in lines if line.kind == "strategy")
        if not strategies:
            return ""
        name = strategies.most_common(1)[0][0]
        ordered = sorted(dict.fromkeys(lines), key=lambda line: (line.name != name, line.kind != "strategy"))
        return abstract_prompt([line.text for line in ordered[:MAX_INSIGHTS]])

    def parse_abstraction(self, text: str) -> str | None:
        """Return `pattern use zib red>gold` if the text is `use zib red>gold`."""
        line = parse_line(f"pattern {self._without_specials(text)}")
        return line.text if line is not None else None

    def _ids(self, text: str) -> list[int]:
        unknown = [word for word in text.split() if word not in self.known_words]
        if unknown:
            raise AlignmentError(
                f"the tiny world has no word {unknown[0]!r} (in {text[:80]!r}); "
                "use model.prompts: chat for text from outside the tiny world."
            )
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=False)]

    def _without_specials(self, text: str) -> str:
        return " ".join(word for word in text.split() if word not in self.special_words)


def _name_in(task: Task) -> str:
    """Return the name in the task's question."""
    puzzle = parse_statement(task.question)
    if puzzle is None:
        raise AlignmentError(f"task {task.task_id} is not from the tiny world; use model.prompts: chat.")
    return puzzle.name
