"""Probes of the hard tiny model, on fresh samples: does it follow the reader's rule, and err as often as it should?

Probabilities come directly from the model; only execution and abstraction are generated, greedily.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pmd.bootstrap.generate import greedy, next_token_probabilities
from pmd.bootstrap.hard_samples import (
    COMMON_BOXES,
    HABIT,
    RARE_BOXES,
    TOKEN_OF,
    abstraction_case,
    choice,
    draw_plan,
    encode_words,
    evidence,
    lines_about_others,
    reflection_shares,
    spoken,
)
from pmd.bootstrap.probe import Probe
from pmd.tasks.prompts.hard_words import BOXES, HARD_VOCABULARY, attempt, reflect_prompt, statement
from pmd.tasks.prompts.words import EOS, Line, solve_prompt
from pmd.tiny.hard_world import HARD_NAMES, Plan, read_off
from pmd.tiny.world import COLOURS

Lines = Callable[[random.Random, str], list[Line]]  # what memory says about a name


def hard_probes(model: PreTrainedModel, samples: int, seed: int) -> list[Probe]:
    """Measure everything."""
    draw = random.Random(f"hard probes {seed}")
    plans = [draw_plan(draw) for _ in range(samples)]
    habit = _after_memory(model, draw, plans, lambda draw, name: [], others=0)
    rare = float(habit[:, _columns(RARE_BOXES)].sum(-1).mean())
    told, _ = _reader(model, draw, plans, _strategy, others=0)
    crowded, _ = _reader(model, draw, plans, _strategy, others=7)
    reached = _after_memory(model, draw, plans, _common_lessons, others=4)[:, _columns(RARE_BOXES)].sum(-1)
    _, gap = _reader(model, draw, plans, lambda draw, name: evidence(draw, name, hard=True), others=4)
    right_name, reflected = _reflection(model, draw, plans)
    return [
        Probe("execution", _execution(model, draw, plans), at_least=0.999),
        Probe("abstraction", _abstraction(model, draw, samples), at_least=0.98),
        Probe("reflection: right kind and name", right_name, at_least=0.999),
        Probe("reflection: nats from its share of errors", reflected, at_most=0.02),
        Probe("no memory: nats from habit", _kl(habit, [HABIT] * samples), at_most=0.01),
        Probe("no memory: rare boxes, all three", rare, at_most=0.01),
        Probe("one strategy followed", told, at_least=0.99),
        Probe("one strategy followed, among 7 lines about others", crowded, at_least=0.985),
        Probe("common boxes excluded: rare boxes opened", float(reached.mean()), at_least=0.97),
        Probe("any memory: nats from the reader's rule", gap, at_most=0.05),
    ]


def _strategy(draw: random.Random, name: str) -> list[Line]:
    return [Line("strategy", name, draw.choice(BOXES))]


def _common_lessons(draw: random.Random, name: str) -> list[Line]:
    return [Line("lesson", name, box) for box in COMMON_BOXES]


def _reader(
    model: PreTrainedModel, draw: random.Random, plans: list[Plan], lines: Lines, others: int
) -> tuple[float, float]:
    """Return the mean probability of the boxes that the reader's rule allows, and the mean KL(rule || model)."""
    wanted: list[dict[str, float]] = []

    def kept(draw: random.Random, name: str) -> list[Line]:
        about = lines(draw, name)
        wanted.append(choice(about))
        return about

    found = _after_memory(model, draw, plans, kept, others)
    shares = wanted[1::2]  # each plan asks about both names, and the second is measured
    mass = torch.stack([row[_columns(share)].sum() for row, share in zip(found, shares, strict=True)])
    return float(mass.mean()), _kl(found, shares)


def _after_memory(model: PreTrainedModel, draw: random.Random, plans: list[Plan], lines: Lines, others: int) -> Tensor:
    """Return the distribution over words for the second name of each plan, [N, V], the first having been answered."""
    prompts: list[str] = []
    for plan in plans:
        strangers = [name for name in HARD_NAMES if name not in plan.names]
        known = [lines(draw, name) for name in plan.names]
        said = [spoken(draw, line, strangers) for about in known for line in about]
        said += lines_about_others(draw, strangers, others)
        draw.shuffle(said)
        first = draw.choice(list(choice(known[0])))
        prompts.append(f"{solve_prompt(statement(plan), said)} {plan.names[0]} {first} {plan.names[1]}")
    return next_token_probabilities(model, [encode_words(prompt) for prompt in prompts])


def _kl(found: Tensor, shares: Sequence[Mapping[str, float]]) -> float:
    """Return the mean KL(shares || model), in nats."""
    total = sum(
        share * (math.log(share) - float(row[TOKEN_OF[box]].log()))
        for row, own in zip(found, shares, strict=True)
        for box, share in own.items()
    )
    return total / len(shares)


def _columns(boxes: Sequence[str] | Mapping[str, float]) -> list[int]:
    return [TOKEN_OF[box] for box in boxes]


def _execution(model: PreTrainedModel, draw: random.Random, plans: list[Plan]) -> float:
    """Return the share of attempts that write the second name, and the right digits after the boxes."""
    chosen = [(draw.choice(COLOURS), draw.choice(COLOURS)) for _ in plans]
    pairs = list(zip(plans, chosen, strict=True))
    named = [f"{solve_prompt(statement(p))} {' '.join(attempt(p, boxes).split()[:4])}" for p, boxes in pairs]
    wanted = [f"; {read_off(boxes, p)} {EOS}" for p, boxes in pairs]
    return _share_written(model, named, wanted)


def _reflection(model: PreTrainedModel, draw: random.Random, plans: list[Plan]) -> tuple[float, float]:
    """Return the share of reflections that begin as they should, and the KL of the box they name, in nats."""
    prompts, wanted, shares = [], [], []
    for plan in plans:
        boxes = (draw.choice(COLOURS), draw.choice(COLOURS))
        which, correct = draw.randrange(2), draw.random() < 0.5
        prompts.append(reflect_prompt(statement(plan), attempt(plan, boxes), plan.names[which], correct))
        wanted.append(f"{'strategy use' if correct else 'lesson not'} {plan.names[which]}")
        shares.append(reflection_shares(f"@{boxes[which]}"))
    begun = [f"{prompt} {text}" for prompt, text in zip(prompts, wanted, strict=True)]
    found = next_token_probabilities(model, [encode_words(prompt) for prompt in begun])
    return _share_written(model, prompts, wanted), _kl(found, shares)


def _abstraction(model: PreTrainedModel, draw: random.Random, samples: int) -> float:
    cases = [abstraction_case(draw) for _ in range(samples)]
    return _share_written(model, [prompt for prompt, _ in cases], [f"{written}{EOS}" for _, written in cases])


def _share_written(model: PreTrainedModel, prompts: list[str], wanted: list[str]) -> float:
    longest = max(len(text.split()) for text in wanted)
    written = greedy(model, [encode_words(prompt) for prompt in prompts], longest, TOKEN_OF[EOS])
    texts = [" ".join(HARD_VOCABULARY[token] for token in ids) for ids in written]
    return sum(text == want for text, want in zip(texts, wanted, strict=True)) / len(wanted)
