"""The tiny world: its problems, and which name is bound to which rule. No torch.

Enters: a number of boxes and a seed. Leaves: problems, and what is right for them. A *rule* is an ordered pair of
distinct boxes, `red>gold`: open these two and read off their digits. A *family* is a made-up name bound to a rule.
A *problem* is a name and a row of boxes with distinct digits. Four boxes give 12 rules, six give 30; every rule and
box of the small world is one of the large world too, so that one vocabulary serves both.
"""

import itertools
import random
from dataclasses import dataclass

COLOURS = ("red", "blue", "green", "gold", "pink", "grey")
DIGITS = tuple("0123456789")
BOX_COUNTS = (4, 6)


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of boxes, and the name of the plan to follow."""

    name: str
    digits: tuple[str, ...]  # of the boxes, in the order of COLOURS

    @property
    def boxes(self) -> int:
        """How many boxes are shown."""
        return len(self.digits)


def _made_up_names(count: int) -> tuple[str, ...]:
    """Return distinct consonant-vowel-consonant names, always the same, none of them an English word of the world."""
    words = ["".join(letters) for letters in itertools.product("bdfgklmnprstvz", "aeiou", "bdgkmnpx")]
    words = [word for word in words if word not in {"red", "bad", "big", "not"}]
    return tuple(random.Random("names of the tiny world").sample(words, count))


NAMES = _made_up_names(64)


def rules_of(boxes: int) -> tuple[str, ...]:
    """Return the rules that can be followed with this many boxes."""
    return tuple(f"{first}>{second}" for first, second in itertools.permutations(COLOURS[:boxes], 2))


ALL_RULES = rules_of(max(BOX_COUNTS))


def opened(rule: str, problem: Problem) -> list[tuple[str, str]]:
    """Return (colour, digit) of the two boxes that the rule opens, in its order."""
    return [(colour, problem.digits[COLOURS.index(colour)]) for colour in rule.split(">")]


def execution(rule: str, problem: Problem) -> str:
    """Return what following the rule reads off: `red 3 gold 7`."""
    return " ".join(f"{colour} {digit}" for colour, digit in opened(rule, problem))


def solution(rule: str, problem: Problem) -> str:
    """Return a whole attempt by one rule: `red>gold ; red 3 gold 7`."""
    return f"{rule} ; {execution(rule, problem)}"


def answer(rule: str, problem: Problem) -> str:
    """Return the two digits the rule reads off: `3 7`."""
    return " ".join(digit for _, digit in opened(rule, problem))


def random_problem(draw: random.Random, name: str, boxes: int) -> Problem:
    """Draw a row of boxes with distinct digits."""
    return Problem(name, tuple(draw.sample(DIGITS, boxes)))


def make_world(boxes: int, families: int, seed: int) -> dict[str, str]:
    """Bind `families` of the 64 names to rules; the same seed gives the same world."""
    draw = random.Random(f"tiny world {boxes} {seed}")
    return {name: draw.choice(rules_of(boxes)) for name in draw.sample(NAMES, families)}


def family_problems(name: str, boxes: int, seed: int, count: int) -> list[Problem]:
    """Return distinct problems of one family; a longer list begins with the shorter one."""
    draw = random.Random(f"tiny problems {boxes} {seed} {name}")
    found: dict[Problem, None] = {}
    while len(found) < count:
        found[random_problem(draw, name, boxes)] = None
    return list(found)
