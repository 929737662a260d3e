"""The language of the hard tiny world: that of the tiny world (words.py), with plans of two names.

    statement    task red 3 blue 5 green 1 gold 7 pink 2 grey 9 plan zib mol
    attempt      zib @red mol @gold ; red 3 gold 7
    memory       strategy use zib @red . lesson not mol @blue . solved zib @red mol @gold ; red 3 gold 7
    reflection   STATEMENT ATTEMPT verdict zib right insight -> strategy use zib @red

`@red` is what a name stands for, `red` a box in the row. An attempt is judged, and reflected on, name by name.
"""

import re
from collections.abc import Sequence

from pmd.tasks.prompts.base import WHOLE, Extent
from pmd.tasks.prompts.words import BOS, EOS, GRAMMAR, PAD, Line, WordPrompts, solve_prompt
from pmd.tiny.hard_world import HARD_NAMES, STEM, Plan, read_off
from pmd.tiny.world import COLOURS, DIGITS
from pmd.types import Rollout, Task

BOXES = tuple(f"@{colour}" for colour in COLOURS)
HARD_VOCABULARY = (PAD, BOS, EOS, *GRAMMAR, *COLOURS, *DIGITS, *BOXES, *HARD_NAMES)


def statement(plan: Plan) -> str:
    """Return the question: `task red 3 ... grey 9 plan zib mol`."""
    return f"task {_row(plan)} plan {' '.join(plan.names)}"


def memory_key(plan: Plan) -> str:
    """Return what retrieval compares: the row, the names, and their stems, which look-alike names share."""
    return f"{_row(plan)} {' '.join(f'{name} {name[:STEM]}' for name in plan.names)}"


def attempt(plan: Plan, boxes: tuple[str, str]) -> str:
    """Return a complete attempt that opens these boxes: `zib @red mol @gold ; red 3 gold 7`."""
    named = " ".join(f"{name} @{box}" for name, box in zip(plan.names, boxes, strict=True))
    return f"{named} ; {read_off(boxes, plan)}"


def stated_choices(text: str) -> list[tuple[str, str]]:
    """Return (name, box word) of an attempt, in its order; empty if it does not begin with two of them and a `;`."""
    words = text.split()
    named = [(words[at], words[at + 1]) for at in (0, 2)] if len(words) > 4 and words[4] == ";" else []
    return named if all(name in HARD_NAMES and box in BOXES for name, box in named) else []


def solved_line(text: str) -> str:
    """Return a verified success as a memory line."""
    return f"solved {text}"


def reflect_prompt(stated: str, text: str, name: str, correct: bool) -> str:
    """Return the prompt that asks what one attempt teaches about one of its names."""
    return f"{BOS} {stated} {text} verdict {name} {'right' if correct else 'wrong'} insight"


class HardWordPrompts(WordPrompts):
    """Prompt format of the hard tiny model. Memory lines are about one name each."""

    names = HARD_NAMES
    rules = BOXES

    def teacher(
        self,
        task: Task,
        items: Sequence[str],
        success: str | None,
        failure: Rollout | None,
        show_attempt: bool = True,
    ) -> list[int]:
        """Return `<bos> memory LINE . LINE . TASK`, or the bare task if there are no lines.

        An item that is a raw attempt is a verified success. Of a failure, each name is shown with its box and verdict;
        the language has no words for a verdict alone.
        """
        lines = [solved_line(item) if stated_choices(item) else item for item in map(self._without_specials, items)]
        if success is not None and stated_choices(success):
            lines.append(solved_line(self._without_specials(success)))
        if failure is not None and show_attempt:
            lines += [
                f"solved {name} {box}" if right else Line("failed", name, box).text
                for name, box, right in self.judged(failure)
            ]
        return self._ids(solve_prompt(task.question, lines))

    def reflection(
        self, task: Task, rollouts: Sequence[Rollout], known: Sequence[str] = (), extent: Extent = WHOLE
    ) -> list[list[int]]:
        """Return one prompt per distinct (name, box, right); attempts that name no boxes teach nothing.

        `known` is ignored: the language cannot express revisions. So is `extent`: each prompt shows one short attempt.
        """
        prompts: dict[tuple[str, str, bool], str] = {}
        for rollout in rollouts:
            text = self._without_specials(rollout.completion.text)
            for name, box, right in self.judged(rollout):
                prompts.setdefault((name, box, right), reflect_prompt(task.question, text, name, right))
        return [self._ids(prompt) for prompt in prompts.values()]

    def judged(self, rollout: Rollout) -> list[tuple[str, str, bool]]:
        """Return (name, box word, right) for both names of an attempt; empty if its verdict says nothing about them."""
        said = re.findall(r"box (right|wrong)", rollout.verdict.feedback)
        chosen = stated_choices(self._without_specials(rollout.completion.text))
        if not rollout.verdict.scored or len(said) != len(chosen):
            return []
        return [(name, box, word == "right") for (name, box), word in zip(chosen, said, strict=True)]


def _row(plan: Plan) -> str:
    return " ".join(f"{colour} {digit}" for colour, digit in zip(COLOURS, plan.digits, strict=True))
