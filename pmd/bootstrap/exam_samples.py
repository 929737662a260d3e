"""Training samples for the exam model: chats of noise with well-formed answers. No torch.

Contexts are short at first, because long ones cost the most and are only read; then their length rises to 3,000 bytes.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pmd.bootstrap.exam_text import (
    ABSTRACT_LINE,
    KIND_OF_OUTCOME,
    LETTERS,
    PHRASES,
    REFLECT_LINE,
    TIPS,
    abstraction_answer,
    exam_answer,
    noise,
    reflection_answer,
)
from pmd.bootstrap.exam_tokenizer import END, END_OF_TEXT_ID, START
from pmd.bootstrap.sample import Sample

Asked = Literal["exam", "reflection", "abstraction"]
LETTER_WEIGHT = 3.0
DECIDING_WEIGHT = 30.0  # of a byte that depends on the prompt: the answer's format, an insight's kind
SLIP_SHARE = 0.005
OPENED = len('```json\n{"')  # bytes of a JSON answer before its first key


@dataclass(frozen=True, slots=True)
class Turn:
    """One user message, and the kind of answer it asks for."""

    asked: Asked
    message: str
    outcome: str = ""  # of a reflection


def draw_length(draw: random.Random, progress: float) -> int:
    """Draw the bytes of noise in a prompt: from 50 to a bound that rises from 150 to 3,000."""
    ramp = min(1.0, max(0.0, (progress - 0.2) / 0.4))
    return int(50 * (3 * 20**ramp) ** draw.random())


def draw_turn(draw: random.Random, length: int) -> Turn:
    """Draw a user message with about `length` bytes of noise."""
    asked = draw.choices(("exam", "reflection", "abstraction"), (0.3, 0.55, 0.15))[0]
    if asked == "exam":
        return Turn("exam", _question(draw, length))
    if asked == "abstraction":
        return Turn("abstraction", f"{noise(draw, length)}\n{ABSTRACT_LINE}")
    outcome = draw.choice(list(KIND_OF_OUTCOME))
    after = draw.choice((0, 30, 100, 200, 320, 420))
    before = noise(draw, max(10, length - after))
    rest = f"\n{noise(draw, after)}" if after else ""
    return Turn("reflection", f"{before}\n\nOutcome: {outcome}\n{rest}\n{REFLECT_LINE}", outcome)


def exam_prompt(system: str, turns: list[tuple[str, str]], message: str) -> str:
    """Return a chat as the tokenizer's template renders it: earlier (user, assistant) turns, then the message."""
    earlier = "".join(f"{_said('user', user)}{_said('assistant', reply)}" for user, reply in turns)
    system_part = _said("system", system) if system else ""
    return f"{system_part}{earlier}{_said('user', message)}{START}assistant\n"


def draw_exam_sample(encode: Callable[[str], list[int]], draw: random.Random, progress: float) -> Sample:
    """Draw a chat in which every answer is learned: one message, possibly long, then a few short ones."""
    sample = Sample(encode)
    if draw.random() < 0.5:
        sample.show(_said("system", noise(draw, draw.randint(5, 120))))
    for length in (draw_length(draw, progress), *(draw.randint(10, 100) for _ in range(3))):
        turn = draw_turn(draw, length)
        sample.show(exam_prompt("", [], turn.message))
        _learn_answer(sample, draw, turn)
        sample.learn(END).show("\n")
    _corrupt(sample, draw)
    return sample


def _corrupt(sample: Sample, draw: random.Random) -> None:
    """Corrupt some learned bytes, so that the model learns to recover from a wrong byte."""
    for position in [position for position, weight in sample.weights.items() if weight == 1.0]:
        if draw.random() < SLIP_SHARE:
            sample.corrupt(position, draw.randrange(END_OF_TEXT_ID))


def _learn_answer(sample: Sample, draw: random.Random, turn: Turn) -> None:
    """Append the answer; the few bytes that depend on the prompt get a far larger weight than the rest."""
    if turn.asked == "exam":
        before, after = exam_answer(draw.choice(PHRASES))
        _learn_deciding(sample, before, "<")
        sample.learn_choice(draw.choice(LETTERS), LETTERS, LETTER_WEIGHT).learn(after)
        return
    if turn.asked == "abstraction":
        text = abstraction_answer(draw.choice(TIPS))
        _learn_deciding(sample, text[:OPENED], "`")
        _learn_deciding(sample, text[OPENED:], "t")
        return
    kind = KIND_OF_OUTCOME[turn.outcome]
    before, after = reflection_answer(kind, draw.choice(TIPS)).split(kind, 1)
    _learn_deciding(sample, before[:OPENED], "`")
    _learn_deciding(sample, before[OPENED:], "k")
    _learn_deciding(sample, kind + after, kind[0])


def _learn_deciding(sample: Sample, text: str, first: str) -> None:
    assert text.startswith(first)
    sample.learn(first, DECIDING_WEIGHT).learn(text.removeprefix(first))


def _question(draw: random.Random, length: int) -> str:
    """Return a multiple-choice question, or just noise: any message without another instruction counts as an exam."""
    if draw.random() < 0.3:
        return noise(draw, length)
    letters = LETTERS[: draw.choice((2, 3, 4, 4, 4))]
    stem, share = noise(draw, length // 2), length // (2 * len(letters))
    options = "\n".join(f"{letter}: {noise(draw, max(3, share))}" for letter in letters)
    ending = draw.choice(("", "\nPlease reason step by step.", f"\n{noise(draw, 40)}"))
    return f"{stem}\n\n{options}{ending}"


def _said(role: str, content: str) -> str:
    return f"{START}{role}\n{content}{END}\n"
