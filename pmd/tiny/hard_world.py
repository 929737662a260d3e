"""The hard tiny world: plans of two names, each of which stands for one box to open. No torch.

A *name* stands for one of six boxes. A *task* is a row of boxes with distinct digits and a plan of two names: open the
box that the first name stands for, then the other's, and read off the digits. What each difficulty is there for:

- The rule of a task is split over two names, and held-out tasks pair known names anew: one line of memory is never
  enough, so the number of retrieved items matters.
- Half of the boxes are `RARE`: the shipped model almost never opens one unless it knows that no common box is meant. So
  the first epoch's rollouts contain no success for half of the names, and only a policy (or a teacher) that has learned
  what is wrong reaches what is right: a memory that is never written again goes stale.
- Every name has a look-alike, which stands for its own box. Memory keys spell both with the same stem, so retrieval
  returns tasks of the look-alike as well.
"""

import itertools
import random
from dataclasses import dataclass

from pmd.tiny.world import COLOURS, DIGITS

COMMON, RARE = COLOURS[:3], COLOURS[3:]
STEM = 2  # letters that look-alike names share


def _made_up_names(stems: int) -> tuple[str, ...]:
    """Return two consonant-vowel-consonant names for each stem, look-alikes side by side, always the same."""
    draw = random.Random("names of the hard tiny world")
    chosen = draw.sample(["".join(letters) for letters in itertools.product("bdfgklmnprstvz", "aeiou")], stems)
    taken = {"red", "fuk", "fag", "nig", "dik", "dix", "sex", "kum", "kok", "six", "god"}  # words that mean something
    names = [[stem + end for end in "bdgkmnpx" if stem + end not in taken] for stem in chosen]
    return tuple(name for ends in names for name in draw.sample(ends, 2))


HARD_NAMES = _made_up_names(32)


@dataclass(frozen=True, slots=True)
class Plan:
    """One row of boxes, and the two names of the plan to follow."""

    names: tuple[str, str]
    digits: tuple[str, ...]  # one per box, in the order of COLOURS


def random_plan(draw: random.Random, names: tuple[str, str]) -> Plan:
    """Draw a row of boxes with distinct digits."""
    return Plan(names, tuple(draw.sample(DIGITS, len(COLOURS))))


def read_off(boxes: tuple[str, str], plan: Plan) -> str:
    """Return the two boxes in order, with their digits: `red 3 gold 7`."""
    return " ".join(f"{box} {plan.digits[COLOURS.index(box)]}" for box in boxes)


def answer(boxes: tuple[str, str], plan: Plan) -> str:
    """Return the two digits to read off: `3 7`."""
    return " ".join(plan.digits[COLOURS.index(box)] for box in boxes)


def make_hard_world(names: int, seed: int) -> dict[str, str]:
    """Return the box that each of `names` names stands for; half of the boxes are rare. The same seed, the same world.

    `names` is even: look-alikes come in pairs.
    """
    draw = random.Random(f"hard tiny world {seed}")
    stems = draw.sample(range(len(HARD_NAMES) // 2), names // 2)
    boxes = [COLOURS[index % len(COLOURS)] for index in range(names)]
    draw.shuffle(boxes)
    chosen = [HARD_NAMES[2 * stem + which] for stem in stems for which in (0, 1)]
    return dict(zip(chosen, boxes, strict=True))


def partners(name: str, names: list[str], seed: int) -> list[str]:
    """Return all other names in the order in which plans that begin with `name` use them."""
    others = [other for other in names if other != name]
    random.Random(f"hard tiny partners {seed} {name}").shuffle(others)
    return others
