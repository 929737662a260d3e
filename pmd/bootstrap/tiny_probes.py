"""Probes of the tiny model, on fresh samples of both worlds.

Probabilities come directly from the model; only execution, reflection and abstraction are generated, greedily.
"""

import math
import random

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pmd.bootstrap.generate import greedy, next_token_probabilities
from pmd.bootstrap.probe import Probe
from pmd.bootstrap.tiny_samples import (
    TOKEN_OF,
    abstraction_case,
    draw_puzzle,
    encode_words,
    lines_about_others,
)
from pmd.tasks.prompts.words import EOS, NOT_KINDS, VOCABULARY, Line, reflect_prompt, solve_prompt, statement
from pmd.tiny.world import BOX_COUNTS, NAMES, Puzzle, execution, rules_of, solution


def tiny_probes(model: PreTrainedModel, samples: int, seed: int) -> list[Probe]:
    """Measure everything, for four and for six boxes."""
    return [probe for boxes in BOX_COUNTS for probe in _world_probes(model, samples, seed, boxes)]


def _world_probes(model: PreTrainedModel, samples: int, seed: int, boxes: int) -> list[Probe]:
    draw = random.Random(f"probes {boxes} {seed}")
    puzzles = [draw_puzzle(draw, boxes=boxes) for _ in range(samples)]
    six_lessons, six_excluded, six_gap = _excluded(model, draw, puzzles, "lesson", 6)
    _, failure_repeated, _ = _excluded(model, draw, puzzles, "failed", 1)
    entropy = _entropy_without_memory(model, puzzles)
    ideal = math.log(len(rules_of(boxes)))
    return [
        Probe(f"{boxes} boxes: execution", _execution(model, draw, puzzles), at_least=0.999),
        Probe(f"{boxes} boxes: reflection", _reflection(model, draw, puzzles), at_least=0.999),
        Probe(f"{boxes} boxes: abstraction", _abstraction(model, draw, samples, boxes), at_least=0.999),
        Probe(f"{boxes} boxes: one strategy followed", _followed(model, draw, puzzles, 0), at_least=0.995),
        Probe(f"{boxes} boxes: strategy among 7 distractors", _followed(model, draw, puzzles, 7), at_least=0.99),
        Probe(f"{boxes} boxes: six lessons, excluded in all", six_excluded, at_most=0.01),
        Probe(f"{boxes} boxes: six lessons, each allowed rule / ideal", six_lessons, at_least=0.99),
        Probe(f"{boxes} boxes: six lessons, nats from uniform", six_gap, at_most=0.02),
        Probe(f"{boxes} boxes: own failure repeated", failure_repeated, at_most=0.005),
        Probe(f"{boxes} boxes: no memory, |entropy - ln {len(rules_of(boxes))}|", abs(ideal - entropy), at_most=0.02),
    ]


def _execution(model: PreTrainedModel, draw: random.Random, puzzles: list[Puzzle]) -> float:
    """Return the share of attempts that write the right digits after the rule."""
    rules = [draw.choice(rules_of(puzzle.boxes)) for puzzle in puzzles]
    prompts = [f"{solve_prompt(statement(p))} {rule}" for p, rule in zip(puzzles, rules, strict=True)]
    wanted = [f"; {execution(rule, p)} {EOS}" for p, rule in zip(puzzles, rules, strict=True)]
    return _share_written(model, prompts, wanted)


def _reflection(model: PreTrainedModel, draw: random.Random, puzzles: list[Puzzle]) -> float:
    prompts, wanted = [], []
    for puzzle in puzzles:
        rule, correct = draw.choice(rules_of(puzzle.boxes)), draw.random() < 0.5
        prompts.append(reflect_prompt(statement(puzzle), solution(rule, puzzle), correct))
        wanted.append(f"{Line('strategy' if correct else 'lesson', puzzle.name, rule).text} {EOS}")
    return _share_written(model, prompts, wanted)


def _abstraction(model: PreTrainedModel, draw: random.Random, samples: int, boxes: int) -> float:
    cases = [abstraction_case(draw, boxes=boxes) for _ in range(samples)]
    return _share_written(model, [prompt for prompt, _ in cases], [f"{written}{EOS}" for _, written in cases])


def _followed(model: PreTrainedModel, draw: random.Random, puzzles: list[Puzzle], distractors: int) -> float:
    """Return the mean probability of the rule that a strategy line states, among lines about other names."""
    prompts, stated = [], []
    for puzzle in puzzles:
        rule = draw.choice(rules_of(puzzle.boxes))
        lines = [Line("strategy", puzzle.name, rule).text, *lines_about_others(draw, puzzle, NAMES, distractors)]
        draw.shuffle(lines)
        prompts.append(solve_prompt(statement(puzzle), lines))
        stated.append([rule])
    return float(_mass(model, prompts, stated).mean())


def _excluded(
    model: PreTrainedModel, draw: random.Random, puzzles: list[Puzzle], kind: str, count: int
) -> tuple[float, float, float]:
    """Return (an allowed rule's mean probability / ideal, the excluded rules' mean mass, mean KL from uniform)."""
    assert kind in NOT_KINDS
    prompts, excluded, allowed = [], [], []
    for puzzle in puzzles:
        wrong = draw.sample(rules_of(puzzle.boxes), count)
        lines = [Line("lesson" if kind == "lesson" else "failed", puzzle.name, rule).text for rule in wrong]
        prompts.append(solve_prompt(statement(puzzle), lines))
        excluded.append(wrong)
        allowed.append([rule for rule in rules_of(puzzle.boxes) if rule not in wrong])
    probabilities = next_token_probabilities(model, [encode_words(prompt) for prompt in prompts])
    on_allowed = torch.stack([row[_ids(rules)] for row, rules in zip(probabilities, allowed, strict=True)])  # [N, A]
    on_excluded = torch.stack([row[_ids(rules)].sum() for row, rules in zip(probabilities, excluded, strict=True)])
    gap = -(on_allowed * on_allowed.shape[1]).log().mean()  # KL(uniform over allowed || model)
    return float(on_allowed.mean() * on_allowed.shape[1]), float(on_excluded.mean()), float(gap)


def _entropy_without_memory(model: PreTrainedModel, puzzles: list[Puzzle]) -> float:
    prompts = [solve_prompt(statement(puzzle)) for puzzle in puzzles]
    probabilities = next_token_probabilities(model, [encode_words(prompt) for prompt in prompts])
    return float(-torch.special.xlogy(probabilities, probabilities).sum(-1).mean())


def _mass(model: PreTrainedModel, prompts: list[str], rules: list[list[str]]) -> Tensor:
    """Return the total probability of the given rules after each prompt, [N]."""
    probabilities = next_token_probabilities(model, [encode_words(prompt) for prompt in prompts])
    return torch.stack([row[_ids(some)].sum() for row, some in zip(probabilities, rules, strict=True)])


def _ids(rules: list[str]) -> list[int]:
    return [TOKEN_OF[rule] for rule in rules]


def _share_written(model: PreTrainedModel, prompts: list[str], wanted: list[str]) -> float:
    longest = max(len(text.split()) for text in wanted)
    written = greedy(model, [encode_words(prompt) for prompt in prompts], longest, TOKEN_OF[EOS])
    texts = [" ".join(VOCABULARY[token] for token in ids) for ids in written]
    return sum(text == want for text, want in zip(texts, wanted, strict=True)) / len(wanted)
