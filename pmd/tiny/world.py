"""The tiny world: its puzzles, their solutions, and the rule behind each name. No torch.

A *rule* is an ordered pair of distinct boxes, such as `red>gold`: open these two and read off their digits. A *family*
is a made-up name bound to a rule. A *puzzle* is a name and a row of boxes with distinct digits. Four boxes give 12
rules, six give 30. The large world contains every rule and box of the small one, so both share a vocabulary.
"""

import itertools
import random
from dataclasses import dataclass

COLOURS = ("red", "blue", "green", "gold", "pink", "grey")
DIGITS = tuple("0123456789")
BOX_COUNTS = (4, 6)


@dataclass(frozen=True, slots=True)
class Puzzle:
    """One row of boxes, and the name of the plan to follow."""

    name: str
    digits: tuple[str, ...]  # one per box, in the order of COLOURS

    @property
    def boxes(self) -> int:
        """The number of boxes."""
        return len(self.digits)


def _made_up_names(count: int) -> tuple[str, ...]:
    """Return distinct consonant-vowel-consonant names, always the same, none of them a word of the tiny language."""
    words = ["".join(letters) for letters in itertools.product("bdfgklmnprstvz", "aeiou", "bdgkmnpx")]
    words = [word for word in words if word not in {"red", "bad", "big", "not"}]
    return tuple(random.Random("names of the tiny world").sample(words, count))


NAMES = _made_up_names(64)


def rules_of(boxes: int) -> tuple[str, ...]:
    """Return the rules of a world with this many boxes."""
    return tuple(f"{first}>{second}" for first, second in itertools.permutations(COLOURS[:boxes], 2))


ALL_RULES = rules_of(max(BOX_COUNTS))


def opened(rule: str, puzzle: Puzzle) -> list[tuple[str, str]]:
    """Return (colour, digit) of the two boxes that the rule opens, in its order."""
    return [(colour, puzzle.digits[COLOURS.index(colour)]) for colour in rule.split(">")]


def execution(rule: str, puzzle: Puzzle) -> str:
    """Return the two boxes that the rule opens, with their digits: `red 3 gold 7`."""
    return " ".join(f"{colour} {digit}" for colour, digit in opened(rule, puzzle))


def solution(rule: str, puzzle: Puzzle) -> str:
    """Return a complete attempt that follows the rule: `red>gold ; red 3 gold 7`."""
    return f"{rule} ; {execution(rule, puzzle)}"


def answer(rule: str, puzzle: Puzzle) -> str:
    """Return the two digits the rule reads off: `3 7`."""
    return " ".join(digit for _, digit in opened(rule, puzzle))


def random_puzzle(draw: random.Random, name: str, boxes: int) -> Puzzle:
    """Draw a row of boxes with distinct digits."""
    return Puzzle(name, tuple(draw.sample(DIGITS, boxes)))


def make_world(boxes: int, families: int, seed: int) -> dict[str, str]:
    """Bind `families` of the 64 names to random rules; the same seed gives the same world."""
    draw = random.Random(f"tiny world {boxes} {seed}")
    return {name: draw.choice(rules_of(boxes)) for name in draw.sample(NAMES, families)}


def family_puzzles(name: str, boxes: int, seed: int, count: int) -> list[Puzzle]:
    """Return distinct puzzles of one family; a larger `count` only appends puzzles."""
    draw = random.Random(f"tiny problems {boxes} {seed} {name}")
    found: dict[Puzzle, None] = {}
    while len(found) < count:
        found[random_puzzle(draw, name, boxes)] = None
    return list(found)
