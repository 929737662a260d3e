"""The tiny world in words: statements, memory lines and prompts, and the way back. No torch.

Enters: problems, rules, lines. Leaves: text, one word per token. Parsers return None for what is not well formed;
they never raise.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pmd.tiny.world import ALL_RULES, BOX_COUNTS, COLOURS, DIGITS, NAMES, Problem

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
