"""Training samples for the tiny model: attempts, memory use, reflection and abstraction in both worlds. No torch.

The rule behind a name is redrawn for every sample, so the model learns nothing about any family; it learns to read its
prompt. The label of a rule is the exact distribution: the stated rule, or uniform over the rules that no line excludes.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pmd.bootstrap.sample import Sample
from pmd.tasks.prompts.words import (
    BOS,
    EOS,
    NOT_KINDS,
    VOCABULARY,
    Line,
    abstract_prompt,
    boxes_text,
    memory_text,
    reflect_prompt,
    solve_prompt,
    solved_line,
    statement,
)
from pmd.tiny.world import BOX_COUNTS, NAMES, Puzzle, execution, random_puzzle, rules_of, solution

TOKEN_OF = {word: index for index, word in enumerate(VOCABULARY)}
RULE_WEIGHT = 3.0
COPY_WEIGHT = 0.5
MAX_LESSONS = {4: 11, 6: 12}
BOX_SHARES = (0.3, 0.7)  # more rules need more practice
SHARES = {"solve": 0.08, "memory": 0.40, "quiz": 0.32, "reflect": 0.12, "abstract": 0.08}


@dataclass(frozen=True, slots=True)
class Difficulty:
    """How hard the samples are; every value changes with the progress of training, in [0, 1]."""

    names: int  # number of names that occur, up to 64
    hard_share: float  # share of samples with several lines per name, and lines about other names
    copy_share: float  # share of samples that only copy random words, to keep the induction heads working

    @staticmethod
    def at(progress: float) -> "Difficulty":
        """Return the difficulty at this progress of training."""
        ramp = min(1.0, progress / 0.15)
        copying = 0.03 + 0.42 * max(0.0, 1 - progress / 0.08)
        return Difficulty(names=int(8 * 8**ramp), hard_share=0.1 + 0.9 * ramp, copy_share=copying)


def encode_words(text: str) -> list[int]:
    """Return the ids of a text in the tiny language."""
    return [TOKEN_OF[word] for word in text.split()]


#: Draws a sample of one kind.
Maker = Callable[[random.Random, Difficulty], Sample]


def draw_sample(draw: random.Random, difficulty: Difficulty) -> Sample:
    """Draw one sample from the mixture."""
    if draw.random() < difficulty.copy_share:
        return draw_copy(draw, VOCABULARY[3:], encode_words)
    makers: dict[str, Maker] = {
        "solve": _solve, "memory": _memory, "quiz": _quiz, "reflect": _reflect, "abstract": _abstract
    }  # fmt: skip
    return draw_kind(draw, SHARES, makers)(draw, difficulty)


def draw_kind(draw: random.Random, shares: Mapping[str, float], makers: Mapping[str, Maker]) -> Maker:
    """Return the maker of a kind drawn by its share."""
    return makers[draw.choices(list(shares), list(shares.values()))[0]]


def draw_puzzle(draw: random.Random, names: int = len(NAMES), boxes: int | None = None) -> Puzzle:
    """Draw a puzzle, of either world unless `boxes` is given."""
    return random_puzzle(draw, draw.choice(NAMES[:names]), boxes or draw.choices(BOX_COUNTS, BOX_SHARES)[0])


def lines_about_others(draw: random.Random, puzzle: Puzzle, names: Sequence[str], count: int) -> list[str]:
    """Draw lines about names other than the puzzle's."""
    lines = []
    for name in draw.sample([name for name in names if name != puzzle.name], min(count, len(names) - 1)):
        rule = draw.choice(rules_of(puzzle.boxes))
        kind = draw.choice(("strategy", "strategy", "strategy", "pattern", "pattern", "solved", "lesson", "failed"))
        other = random_puzzle(draw, name, puzzle.boxes)
        lines.append(solved_line(name, solution(rule, other)) if kind == "solved" else Line(kind, name, rule).text)
    return lines


def abstraction_case(draw: random.Random, names: int = len(NAMES), boxes: int | None = None) -> tuple[str, str]:
    """Draw an abstraction prompt and its continuation, which is empty if nothing succeeded."""
    puzzle = draw_puzzle(draw, names, boxes)
    rules = rules_of(puzzle.boxes)
    true = draw.choice(rules)
    wrong = [rule for rule in rules if rule != true]
    lines = [Line("lesson", puzzle.name, rule).text for rule in draw.sample(wrong, draw.choice([0, 1, 2, 3, 5]))]
    if lines and draw.random() < 0.2:
        return abstract_prompt(lines), ""
    lines += [Line("strategy", puzzle.name, true).text] * draw.choice([1, 1, 2, 3, 5])
    others = []
    if draw.random() < 0.3:
        others = lines_about_others(draw, puzzle, NAMES[:names], draw.choice([1, 2]))
    draw.shuffle(lines)
    rest = lines[1:] + [line for line in others if not line.startswith("solved")]
    draw.shuffle(rest)
    return abstract_prompt([lines[0], *rest]), f"use {puzzle.name} {true} "


def draw_copy(draw: random.Random, words: Sequence[str], encode: Callable[[str], list[int]]) -> Sample:
    """Draw random words, followed by the same words from a random start."""
    words = draw.sample(words, draw.randint(6, 24))
    start = draw.randrange(len(words) - 4)
    shown = Sample(encode).show(f"{BOS} {' '.join(words)} {words[start]}")
    return shown.learn(" ".join(words[start + 1 :]), COPY_WEIGHT)


def _attempt(draw: random.Random, prompt: str, puzzle: Puzzle, allowed: Sequence[str]) -> Sample:
    rule = draw.choice(allowed)
    sample = Sample(encode_words).show(prompt).learn_choice(rule, allowed, RULE_WEIGHT)
    return sample.learn(f"; {execution(rule, puzzle)} {EOS}")


def _solve(draw: random.Random, difficulty: Difficulty) -> Sample:
    """Draw an attempt without memory: the label is uniform over all rules."""
    puzzle = draw_puzzle(draw, difficulty.names)
    return _attempt(draw, solve_prompt(statement(puzzle)), puzzle, rules_of(puzzle.boxes))


def _memory(draw: random.Random, difficulty: Difficulty) -> Sample:
    puzzle = draw_puzzle(draw, difficulty.names)
    hard = draw.random() < difficulty.hard_share
    lines, allowed = _known(draw, puzzle, hard, max_lessons=draw.choice([4, 8, 12]))
    if hard:
        lines = lines + lines_about_others(draw, puzzle, NAMES[: difficulty.names], draw.choice([0, 1, 2, 3, 4, 7]))
    draw.shuffle(lines)
    return _attempt(draw, solve_prompt(statement(puzzle), lines), puzzle, allowed)


def _quiz(draw: random.Random, difficulty: Difficulty) -> Sample:
    """Draw one memory and one row of boxes with many plans, the densest practice in reading memory."""
    row = draw_puzzle(draw, difficulty.names)
    hard = draw.random() < difficulty.hard_share
    binding_only = draw.random() < 0.35
    count = draw.choice([2, 4, 6, 8] if binding_only else [2, 3, 4, 5, 6]) if hard else 2
    lines: list[str] = []
    allowed: dict[str, Sequence[str]] = {}
    for name in draw.sample(NAMES[: difficulty.names], min(count, difficulty.names)):
        if binding_only:
            allowed[name] = (draw.choice(rules_of(row.boxes)),)
            lines.append(Line(draw.choice(("strategy", "strategy", "pattern")), name, allowed[name][0]).text)
        else:
            max_lessons = 6 if count > 2 else 12
            about, allowed[name] = _known(draw, Puzzle(name, row.digits), hard, max_lessons)
            lines += about
    draw.shuffle(lines)
    sample = Sample(encode_words).show(f"{BOS} {memory_text(lines)}task {boxes_text(row)}")
    for name in draw.sample(list(allowed), len(allowed)):
        sample.show(f"plan {name}").learn_choice(draw.choice(allowed[name]), allowed[name], RULE_WEIGHT)
    return sample


def _known(draw: random.Random, puzzle: Puzzle, hard: bool, max_lessons: int) -> tuple[list[str], Sequence[str]]:
    """Draw lines about the puzzle's name, and the rules they allow."""
    rules = rules_of(puzzle.boxes)
    max_lessons = min(max_lessons, MAX_LESSONS[puzzle.boxes])
    kind = draw.random()
    if kind < 0.40:
        true = draw.choice(rules)
        lines = [_true_line(draw, puzzle, true) for _ in range(draw.choice([1, 1, 1, 2, 3]) if hard else 1)]
        if hard and draw.random() < 0.5:
            wrong = draw.sample([rule for rule in rules if rule != true], min(max_lessons, draw.choice([1, 2, 3, 6])))
            lines += [_false_line(draw, puzzle.name, rule) for rule in wrong]
        return lines, (true,)
    if kind < 0.92:
        wrong = draw.sample(rules, min(max_lessons, draw.choice([1, 1, 1, 2, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12])))
        lines = [_false_line(draw, puzzle.name, rule) for rule in wrong]
        if hard and draw.random() < 0.15:
            lines.append(_false_line(draw, puzzle.name, draw.choice(wrong)))
        return lines, [rule for rule in rules if rule not in wrong]
    return [], rules


def _true_line(draw: random.Random, puzzle: Puzzle, rule: str) -> str:
    kind = draw.choice(("strategy", "strategy", "pattern", "solved"))
    if kind != "solved":
        return Line(kind, puzzle.name, rule).text
    shown = puzzle if draw.random() < 0.5 else random_puzzle(draw, puzzle.name, puzzle.boxes)
    return solved_line(puzzle.name, solution(rule, shown))


def _false_line(draw: random.Random, name: str, rule: str) -> str:
    return Line(draw.choices(NOT_KINDS, (0.8, 0.2))[0], name, rule).text


def _reflect(draw: random.Random, difficulty: Difficulty) -> Sample:
    puzzle = draw_puzzle(draw, difficulty.names)
    rule, correct = draw.choice(rules_of(puzzle.boxes)), draw.random() < 0.5
    prompt = reflect_prompt(statement(puzzle), solution(rule, puzzle), correct)
    line = Line("strategy" if correct else "lesson", puzzle.name, rule)
    return Sample(encode_words).show(prompt).learn(f"{line.text} {EOS}")


def _abstract(draw: random.Random, difficulty: Difficulty) -> Sample:
    prompt, continuation = abstraction_case(draw, difficulty.names)
    return Sample(encode_words).show(prompt).learn(f"{continuation}{EOS}")
