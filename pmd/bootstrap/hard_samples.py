"""Training samples for the hard tiny model: attempts, memory use, imperfect reflection and abstraction. No torch.

What a name stands for is redrawn for every sample. The label of a box is the exact distribution of `choice`, the
reader's rule, or, in a reflection, of what an imperfect writer says.
"""

import random
from collections.abc import Sequence

from pmd.bootstrap.sample import Sample
from pmd.bootstrap.tiny_samples import Difficulty, Maker, draw_copy, draw_kind
from pmd.tasks.prompts.hard_words import (
    BOXES,
    HARD_VOCABULARY,
    attempt,
    reflect_prompt,
    solved_line,
    statement,
)
from pmd.tasks.prompts.words import EOS, Line, LineKind, abstract_prompt, solve_prompt
from pmd.tiny.hard_world import COMMON, HARD_NAMES, RARE, Plan, random_plan, read_off
from pmd.tiny.world import COLOURS

TOKEN_OF = {word: index for index, word in enumerate(HARD_VOCABULARY)}
RARE_SHARE = 0.001  # of each rare box, when nothing is known
RELIABILITY = 0.85  # share of reflections that name the box that was opened; the others name any other box
PATTERN_TRUST = 9.0  # a pattern rests on several tasks, so it counts this many times as much as a strategy
BOX_WEIGHT = 3.0
COMMON_BOXES, RARE_BOXES = (tuple(f"@{colour}" for colour in some) for some in (COMMON, RARE))
HABIT = dict.fromkeys(COMMON_BOXES, (1 - len(RARE) * RARE_SHARE) / len(COMMON)) | dict.fromkeys(RARE_BOXES, RARE_SHARE)
SHARES = {"solve": 0.10, "memory": 0.38, "quiz": 0.30, "reflect": 0.14, "abstract": 0.08}


def encode_words(text: str) -> list[int]:
    """Return the ids of a text in the language of the hard world."""
    return [TOKEN_OF[word] for word in text.split()]


def choice(lines: Sequence[Line]) -> dict[str, float]:
    """Return the share of each box for a name, given the lines about it: the reader's rule.

    1. A verified success is followed.
    2. Else patterns and strategies are followed, a pattern `PATTERN_TRUST` times as often. A strategy that a lesson
       contradicts is ignored, and so is either if the box has just been tried and failed.
    3. Else habit decides among the boxes that neither lessons nor the own failure exclude.
    """
    said = {kind: {line.rule for line in lines if line.kind == kind} for kind in ("solved", "pattern", "strategy")}
    failed = {line.rule for line in lines if line.kind == "failed"}
    excluded = failed | {line.rule for line in lines if line.kind == "lesson"}
    trusted = dict.fromkeys(said["solved"], 1.0)
    if not trusted:
        trusted = dict.fromkeys(said["strategy"] - excluded, 1.0)
        for box in said["pattern"] - failed:
            trusted[box] = trusted.get(box, 0.0) + PATTERN_TRUST
    if not trusted:
        for out in (excluded, failed, set[str]()):
            trusted = trusted or {box: share for box, share in HABIT.items() if box not in out}
    total = sum(trusted.values())
    return {box: trusted[box] / total for box in BOXES if box in trusted}


def draw_hard_sample(draw: random.Random, difficulty: Difficulty) -> Sample:
    """Draw one sample from the mixture."""
    if draw.random() < difficulty.copy_share:
        return draw_copy(draw, HARD_VOCABULARY[3:], encode_words)
    makers: dict[str, Maker] = {
        "solve": _solve, "memory": _memory, "quiz": _quiz, "reflect": _reflect, "abstract": _abstract
    }  # fmt: skip
    return draw_kind(draw, SHARES, makers)(draw, difficulty)


def draw_plan(draw: random.Random, names: int = len(HARD_NAMES)) -> Plan:
    """Draw a plan of two different names."""
    first, second = draw.sample(HARD_NAMES[:names], 2)
    return random_plan(draw, (first, second))


def evidence(draw: random.Random, name: str, hard: bool) -> list[Line]:
    """Draw what memory says about one name."""
    kind = draw.random()
    true = draw.choice(BOXES)
    others = [box for box in BOXES if box != true]
    lines: list[Line] = []
    if kind < 0.12:
        return lines
    if kind < 0.62:
        kinds: list[LineKind] = ["pattern", "strategy"] if hard and draw.random() < 0.5 else [_any_use(draw)]
        lines += [Line(each, name, true) for each in kinds]
        if hard:
            wrong = draw.sample(others, draw.choice([0, 0, 0, 1, 1, 2]))
            lines += [Line("pattern" if draw.random() < 0.15 else "strategy", name, box) for box in wrong]
            excluded = draw.sample(others, draw.choice([0, 0, 1, 2, 3]))
            lines += [Line("lesson", name, box) for box in excluded]
            if draw.random() < 0.2:
                lines.append(Line("lesson", name, true))
    else:
        first = draw.sample(COMMON_BOXES, 3)  # what the policy tries first
        tried = [*first, *draw.sample(RARE_BOXES, 3)] if draw.random() < 0.8 else draw.sample(BOXES, 6)
        lines += [Line("lesson", name, box) for box in tried[: draw.choice([1, 2, 3, 3, 3, 4, 5] if hard else [1, 3])]]
    if hard and draw.random() < 0.15:
        lines.append(Line("failed", name, draw.choice(others)))
    return list(dict.fromkeys(lines))


def lines_about_others(draw: random.Random, names: Sequence[str], count: int) -> list[str]:
    """Draw lines about the given names."""
    kinds: tuple[LineKind, ...] = ("strategy", "strategy", "pattern", "lesson", "lesson", "failed", "solved")
    lines: list[str] = []
    for name in draw.sample(list(names), min(count, len(names))):
        kind = draw.choice(kinds)
        if kind == "solved":
            pair = (name, draw.choice([other for other in names if other != name])) if len(names) > 1 else (name, name)
            lines.append(_solved(draw, pair, (draw.choice(COLOURS), draw.choice(COLOURS))))
        else:
            lines.append(Line(kind, name, draw.choice(BOXES)).text)
    return lines


def spoken(draw: random.Random, line: Line, others: Sequence[str]) -> str:
    """Return the words of a line; a verified success may also speak of another name, which must occur nowhere else."""
    if line.kind != "solved":
        return line.text
    if draw.random() < 0.3 or not others:
        return f"solved {line.name} {line.rule}"
    pair = [(line.name, line.rule[1:]), (draw.choice(others), draw.choice(COLOURS))]
    draw.shuffle(pair)
    return _solved(draw, (pair[0][0], pair[1][0]), (pair[0][1], pair[1][1]))


def abstraction_case(draw: random.Random, names: int = len(HARD_NAMES)) -> tuple[str, str]:
    """Draw an abstraction prompt and its continuation: what the first line says."""
    name, other = draw.sample(HARD_NAMES[:names], 2)
    boxes = draw.sample(BOXES, draw.choice([1, 1, 2, 3]))
    rest = [Line("strategy", name, box).text for box in boxes[1:]]
    rest += [Line("lesson", name, box).text for box in draw.sample(BOXES, draw.choice([0, 1, 2, 3]))]
    if draw.random() < 0.3:
        rest += [Line("strategy", other, box).text for box in draw.sample(BOXES, draw.choice([1, 2]))]
    draw.shuffle(rest)
    return abstract_prompt([Line("strategy", name, boxes[0]).text, *rest]), f"use {name} {boxes[0]} "


def reflection_shares(box: str) -> dict[str, float]:
    """Return how often a reflection on an opened box names each box."""
    return {other: RELIABILITY if other == box else (1 - RELIABILITY) / (len(BOXES) - 1) for other in BOXES}


def _any_use(draw: random.Random) -> LineKind:
    kinds: tuple[LineKind, ...] = ("strategy", "strategy", "pattern", "solved")
    return draw.choice(kinds)


def _solved(draw: random.Random, names: tuple[str, str], boxes: tuple[str, str]) -> str:
    return solved_line(attempt(random_plan(draw, names), boxes))


def _learn_box(draw: random.Random, sample: Sample, shares: dict[str, float], weight: float = BOX_WEIGHT) -> str:
    """Append one box of the distribution, any with the same probability, and learn the distribution; return it."""
    box = draw.choice(list(shares))
    sample.learn_shares(box, shares, weight)
    return box


def _attempt(draw: random.Random, prompt: str, plan: Plan, shares: Sequence[dict[str, float]]) -> Sample:
    sample = Sample(encode_words).show(prompt)
    boxes: list[str] = []
    for name, own in zip(plan.names, shares, strict=True):
        sample.learn(name)
        boxes.append(_learn_box(draw, sample, own)[1:])
    return sample.learn(f"; {read_off((boxes[0], boxes[1]), plan)} {EOS}")


def _solve(draw: random.Random, difficulty: Difficulty) -> Sample:
    plan = draw_plan(draw, difficulty.names)
    return _attempt(draw, solve_prompt(statement(plan)), plan, (HABIT, HABIT))


def _memory(draw: random.Random, difficulty: Difficulty) -> Sample:
    plan = draw_plan(draw, difficulty.names)
    hard = draw.random() < difficulty.hard_share
    others = [name for name in HARD_NAMES[: difficulty.names] if name not in plan.names]
    known = [evidence(draw, name, hard) for name in plan.names]
    lines = [spoken(draw, line, others) for about in known for line in about]
    if hard:
        lines += lines_about_others(draw, others, draw.choice([0, 0, 1, 2, 4, 7]))
    draw.shuffle(lines)
    return _attempt(draw, solve_prompt(statement(plan), lines), plan, [choice(about) for about in known])


def _quiz(draw: random.Random, difficulty: Difficulty) -> Sample:
    """Draw one memory and one row of boxes with many plans, the densest practice in reading memory."""
    hard = draw.random() < difficulty.hard_share
    count = 2 * draw.choice([1, 2, 3] if hard else [1])
    names = draw.sample(HARD_NAMES[: difficulty.names], count)
    binding_only = draw.random() < 0.35
    known = {
        name: [Line(_any_use(draw), name, draw.choice(BOXES))] if binding_only else evidence(draw, name, hard)
        for name in names
    }
    others = [name for name in HARD_NAMES[: difficulty.names] if name not in names]
    lines = [spoken(draw, line, others) for about in known.values() for line in about]
    draw.shuffle(lines)
    plan = random_plan(draw, (names[0], names[1]))
    sample = Sample(encode_words).show(solve_prompt(statement(plan), lines))
    order = draw.sample(names[2:], count - 2)
    for start, pair in enumerate([names[:2], *(order[at : at + 2] for at in range(0, len(order), 2))]):
        if start:
            sample.show(f"; plan {pair[0]} {pair[1]}")
        for name in pair:
            sample.learn(name)
            _learn_box(draw, sample, choice(known[name]))
    return sample


def _reflect(draw: random.Random, difficulty: Difficulty) -> Sample:
    plan = draw_plan(draw, difficulty.names)
    boxes = (draw.choice(COLOURS), draw.choice(COLOURS))
    which, correct = draw.randrange(2), draw.random() < 0.5
    name = plan.names[which]
    sample = Sample(encode_words).show(reflect_prompt(statement(plan), attempt(plan, boxes), name, correct))
    sample.learn(f"strategy use {name}" if correct else f"lesson not {name}")
    _learn_box(draw, sample, reflection_shares(f"@{boxes[which]}"))
    return sample.learn(EOS)


def _abstract(draw: random.Random, difficulty: Difficulty) -> Sample:
    prompt, continuation = abstraction_case(draw, difficulty.names)
    return Sample(encode_words).show(prompt).learn(f"{continuation}{EOS}")
