"""Practice for the tiny model: attempts, memory use, reflection and abstraction in both worlds. No torch.

Enters: a random stream and the progress of training. Leaves: samples. The rule behind a name is drawn anew for every
sample, so that nothing about any family is learnt: what the model learns is to read. Where a rule is to be written
its label is the exact distribution: the stated rule, or all rules of the shown world that no line excludes.
"""

import random
from collections.abc import Callable, Sequence
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
from pmd.tiny.world import BOX_COUNTS, NAMES, Problem, execution, random_problem, rules_of, solution

TOKEN_OF = {word: index for index, word in enumerate(VOCABULARY)}
RULE_WEIGHT = 3.0
COPY_WEIGHT = 0.5
MOST_LESSONS = {4: 11, 6: 12}
BOX_SHARES = (0.3, 0.7)  # more rules take more practice
SHARES = {"solve": 0.08, "memory": 0.40, "quiz": 0.32, "reflect": 0.12, "abstract": 0.08}


@dataclass(frozen=True, slots=True)
class Difficulty:
    """How hard the practice is; every value moves with the progress of training, in [0, 1]."""

    names: int  # how many of the 64 names occur
    hard_share: float  # share of samples with several lines per name, and lines about other names
    copy_share: float  # share of samples that only copy random words, which keeps the induction head alive

    @staticmethod
    def at(progress: float) -> "Difficulty":
        """Return the difficulty at this share of the training steps."""
        ramp = min(1.0, progress / 0.15)
        copying = 0.03 + 0.42 * max(0.0, 1 - progress / 0.08)
        return Difficulty(names=int(8 * 8**ramp), hard_share=0.1 + 0.9 * ramp, copy_share=copying)


def encode_words(text: str) -> list[int]:
    """Return the ids of a text of the tiny world."""
    return [TOKEN_OF[word] for word in text.split()]


def draw_sample(draw: random.Random, difficulty: Difficulty) -> Sample:
    """Draw one sample of the mixture."""
    if draw.random() < difficulty.copy_share:
        return _copy(draw)
    makers: dict[str, Callable[[random.Random, Difficulty], Sample]] = {
        "solve": _solve, "memory": _memory, "quiz": _quiz, "reflect": _reflect, "abstract": _abstract
    }  # fmt: skip
    kind = draw.choices(list(SHARES), list(SHARES.values()))[0]
    return makers[kind](draw, difficulty)


def draw_problem(draw: random.Random, names: int = len(NAMES), boxes: int | None = None) -> Problem:
    """Draw a problem, of either world unless one is named."""
    return random_problem(draw, draw.choice(NAMES[:names]), boxes or draw.choices(BOX_COUNTS, BOX_SHARES)[0])


def lines_about_others(draw: random.Random, problem: Problem, names: Sequence[str], count: int) -> list[str]:
    """Draw lines about names other than the problem's."""
    lines = []
    for name in draw.sample([name for name in names if name != problem.name], min(count, len(names) - 1)):
        rule = draw.choice(rules_of(problem.boxes))
        kind = draw.choice(("strategy", "strategy", "strategy", "pattern", "pattern", "solved", "lesson", "failed"))
        other = random_problem(draw, name, problem.boxes)
        lines.append(solved_line(name, solution(rule, other)) if kind == "solved" else Line(kind, name, rule).text)
    return lines


def abstraction_case(draw: random.Random, names: int = len(NAMES), boxes: int | None = None) -> tuple[str, str]:
    """Draw an abstraction prompt and its continuation, which is empty where nothing succeeded."""
    problem = draw_problem(draw, names, boxes)
    rules = rules_of(problem.boxes)
    true = draw.choice(rules)
    wrong = [rule for rule in rules if rule != true]
    lines = [Line("lesson", problem.name, rule).text for rule in draw.sample(wrong, draw.choice([0, 1, 2, 3, 5]))]
    if lines and draw.random() < 0.2:
        return abstract_prompt(lines), ""
    lines += [Line("strategy", problem.name, true).text] * draw.choice([1, 1, 2, 3, 5])
    others = []
    if draw.random() < 0.3:
        others = lines_about_others(draw, problem, NAMES[:names], draw.choice([1, 2]))
    draw.shuffle(lines)
    rest = lines[1:] + [line for line in others if not line.startswith("solved")]
    draw.shuffle(rest)
    return abstract_prompt([lines[0], *rest]), f"use {problem.name} {true} "


def _copy(draw: random.Random) -> Sample:
    """Random words, then the same words again from a random start."""
    words = draw.sample(VOCABULARY[3:], draw.randint(6, 24))
    start = draw.randrange(len(words) - 4)
    shown = Sample(encode_words).show(f"{BOS} {' '.join(words)} {words[start]}")
    return shown.learn(" ".join(words[start + 1 :]), COPY_WEIGHT)


def _attempt(draw: random.Random, prompt: str, problem: Problem, allowed: Sequence[str]) -> Sample:
    rule = draw.choice(allowed)
    sample = Sample(encode_words).show(prompt).learn_choice(rule, allowed, RULE_WEIGHT)
    return sample.learn(f"; {execution(rule, problem)} {EOS}")


def _solve(draw: random.Random, difficulty: Difficulty) -> Sample:
    """Nothing is known: every rule of the shown world is as good as any other."""
    problem = draw_problem(draw, difficulty.names)
    return _attempt(draw, solve_prompt(statement(problem)), problem, rules_of(problem.boxes))


def _memory(draw: random.Random, difficulty: Difficulty) -> Sample:
    problem = draw_problem(draw, difficulty.names)
    hard = draw.random() < difficulty.hard_share
    lines, allowed = _known(draw, problem, hard, most_lessons=draw.choice([4, 8, 12]))
    if hard:
        lines = lines + lines_about_others(draw, problem, NAMES[: difficulty.names], draw.choice([0, 1, 2, 3, 4, 7]))
    draw.shuffle(lines)
    return _attempt(draw, solve_prompt(statement(problem), lines), problem, allowed)


def _quiz(draw: random.Random, difficulty: Difficulty) -> Sample:
    """One memory and one row of boxes, then many plans: the densest practice in reading memory."""
    row = draw_problem(draw, difficulty.names)
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
            most = 6 if count > 2 else 12
            about, allowed[name] = _known(draw, Problem(name, row.digits), hard, most)
            lines += about
    draw.shuffle(lines)
    sample = Sample(encode_words).show(f"{BOS} {memory_text(lines)}task {boxes_text(row)}")
    for name in draw.sample(list(allowed), len(allowed)):
        sample.show(f"plan {name}").learn_choice(draw.choice(allowed[name]), allowed[name], RULE_WEIGHT)
    return sample


def _known(draw: random.Random, problem: Problem, hard: bool, most_lessons: int) -> tuple[list[str], Sequence[str]]:
    """Draw lines about the problem's name, and the rules they leave."""
    rules = rules_of(problem.boxes)
    most_lessons = min(most_lessons, MOST_LESSONS[problem.boxes])
    kind = draw.random()
    if kind < 0.40:
        true = draw.choice(rules)
        lines = [_true_line(draw, problem, true) for _ in range(draw.choice([1, 1, 1, 2, 3]) if hard else 1)]
        if hard and draw.random() < 0.5:
            wrong = draw.sample([rule for rule in rules if rule != true], min(most_lessons, draw.choice([1, 2, 3, 6])))
            lines += [_false_line(draw, problem.name, rule) for rule in wrong]
        return lines, (true,)
    if kind < 0.92:
        wrong = draw.sample(rules, min(most_lessons, draw.choice([1, 1, 1, 2, 2, 3, 4, 5, 6, 6, 7, 8, 9, 10, 11, 12])))
        lines = [_false_line(draw, problem.name, rule) for rule in wrong]
        if hard and draw.random() < 0.15:
            lines.append(_false_line(draw, problem.name, draw.choice(wrong)))
        return lines, [rule for rule in rules if rule not in wrong]
    return [], rules


def _true_line(draw: random.Random, problem: Problem, rule: str) -> str:
    kind = draw.choice(("strategy", "strategy", "pattern", "solved"))
    if kind != "solved":
        return Line(kind, problem.name, rule).text
    shown = problem if draw.random() < 0.5 else random_problem(draw, problem.name, problem.boxes)
    return solved_line(problem.name, solution(rule, shown))


def _false_line(draw: random.Random, name: str, rule: str) -> str:
    return Line(draw.choices(NOT_KINDS, (0.8, 0.2))[0], name, rule).text


def _reflect(draw: random.Random, difficulty: Difficulty) -> Sample:
    problem = draw_problem(draw, difficulty.names)
    rule, correct = draw.choice(rules_of(problem.boxes)), draw.random() < 0.5
    prompt = reflect_prompt(statement(problem), solution(rule, problem), correct)
    line = Line("strategy" if correct else "lesson", problem.name, rule)
    return Sample(encode_words).show(prompt).learn(f"{line.text} {EOS}")


def _abstract(draw: random.Random, difficulty: Difficulty) -> Sample:
    prompt, continuation = abstraction_case(draw, difficulty.names)
    return Sample(encode_words).show(prompt).learn(f"{continuation}{EOS}")
