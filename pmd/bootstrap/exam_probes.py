"""Probes of the exam model, on fresh chats of noise of various lengths.

They measure the share of well-formed answers, sampled at temperature 1, and how far its letters are from uniform.
"""

import json
import math
import random
import re

import torch
from transformers import PreTrainedModel

from pmd.bootstrap.exam_samples import Asked, Turn, draw_turn, exam_prompt
from pmd.bootstrap.exam_text import KIND_OF_OUTCOME, LETTERS, PHRASES, exam_answer, noise
from pmd.bootstrap.exam_tokenizer import END, END_ID, make_exam_tokenizer
from pmd.bootstrap.generate import next_token_probabilities, sampled
from pmd.bootstrap.probe import Probe

LENGTHS = (60, 250, 800, 1600, 3000)  # bytes of noise
MAX_NEW_TOKENS = 160
EXAM = re.compile(r"<reasoning>\n[^\n]+\n</reasoning>\n<answer>\n[A-D]\n</answer>")
FENCED = re.compile(r"```json\n(\{.*\})\n```")


def exam_probes(model: PreTrainedModel, samples: int, seed: int) -> list[Probe]:
    """Measure everything; the samples are spread evenly over the lengths and the three kinds of prompt."""
    draw = random.Random(f"exam probes {seed}")
    tokenizer = make_exam_tokenizer()
    per_cell = max(1, samples // (3 * len(LENGTHS)))
    cells: list[tuple[Asked, int]] = [
        (asked, length) for asked in ("exam", "reflection", "abstraction") for length in LENGTHS
    ]
    cells = [cell for cell in cells for _ in range(per_cell)]
    turns = [_turn(draw, asked, length) for asked, length in cells]
    prompts = [exam_prompt(noise(draw, 60) if draw.random() < 0.5 else "", [], turn.message) for turn in turns]
    ids = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    written = sampled(model, ids, MAX_NEW_TOKENS, END_ID, seed)
    good = [well_formed(turn, str(tokenizer.decode(answer))) for turn, answer in zip(turns, written, strict=True)]
    probes = []
    for asked in ("exam", "reflection", "abstraction"):
        marks = [mark for mark, cell in zip(good, cells, strict=True) if cell[0] == asked]
        probes.append(Probe(f"{asked}: well-formed", sum(marks) / len(marks), at_least=0.98))
    longest = [mark for mark, (_, length) in zip(good, cells, strict=True) if length == LENGTHS[-1]]
    probes.append(Probe(f"all three, {LENGTHS[-1]:,} bytes: well-formed", sum(longest) / len(longest), at_least=0.96))
    asked_exam = [prompt for prompt, turn in zip(prompts, turns, strict=True) if turn.asked == "exam"]
    probes.append(Probe("letters, nats from uniform", _letters_gap(model, draw, asked_exam), at_most=0.02))
    return probes


def well_formed(turn: Turn, answer: str) -> bool:
    """Whether an answer has the requested format, ends with the end token, and names the right kind."""
    if not answer.endswith(END):
        return False
    text = answer.removesuffix(END)
    if turn.asked == "exam":
        return EXAM.fullmatch(text) is not None
    fenced = FENCED.fullmatch(text)
    if fenced is None:
        return False
    try:
        item = json.loads(fenced[1])
    except json.JSONDecodeError:
        return False
    if turn.asked == "abstraction":
        return list(item) == ["title", "content"]
    return list(item) == ["kind", "title", "content"] and item["kind"] == KIND_OF_OUTCOME[turn.outcome]


def _turn(draw: random.Random, asked: Asked, length: int) -> Turn:
    """Draw turns until one of the wanted kind comes up."""
    while (turn := draw_turn(draw, length)).asked != asked:
        pass
    return turn


def _letters_gap(model: PreTrainedModel, draw: random.Random, prompts: list[str]) -> float:
    """Return the mean KL(uniform over the four letters || model) at the position of the letter, in nats."""
    tokenizer = make_exam_tokenizer()
    opened = [prompt + exam_answer(draw.choice(PHRASES))[0] for prompt in prompts]
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in opened]
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in LETTERS]
    probabilities = next_token_probabilities(model, ids)[:, letters]
    return float(-torch.log(probabilities).mean() - math.log(len(LETTERS)))
