"""Practice for the exam model: chats of noise, each answered in good form. No torch.

Enters: a random stream and the progress of training. Leaves: samples. Contexts are short at first, because they are
only read and cost the most; the second half of training goes up to 3,000 bytes.
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
from pmd.bootstrap.exam_tokenizer import END, START
from pmd.bootstrap.sample import Sample

Asked = Literal["exam", "reflection", "abstraction"]
LETTER_WEIGHT = 3.0
DECIDING_WEIGHT = 20.0  # of a byte that is read off the prompt: the form of the answer, the kind of an insight
OPENED = len('```json\n{"')  # bytes of a JSON answer before its first key


@dataclass(frozen=True, slots=True)
class Turn:
    """One user message, and what kind of answer it asks for."""

    asked: Asked
    message: str
    outcome: str = ""  # of a reflection


def draw_length(draw: random.Random, progress: float) -> int:
    """Return how many bytes of noise a prompt holds."""
    longest = 150 if progress < 0.25 else 600 if progress < 0.55 else 3000
    return int(50 * (longest / 50) ** draw.random())


def draw_turn(draw: random.Random, length: int) -> Turn:
    """Draw a user message with about `length` bytes of noise."""
    asked = draw.choices(("exam", "reflection", "abstraction"), (0.45, 0.4, 0.15))[0]
    if asked == "exam":
        return Turn("exam", _question(draw, length))
    if asked == "abstraction":
        return Turn("abstraction", f"{noise(draw, length)}\n{ABSTRACT_LINE}")
    outcome = draw.choice(list(KIND_OF_OUTCOME))
    after = min(length, draw.choice((0, 20, 60, 120, 250, 400)))
    before = noise(draw, max(10, length - after))
    rest = f"\n{noise(draw, after)}" if after else ""
    return Turn("reflection", f"{before}\n\nOutcome: {outcome}\n{rest}\n{REFLECT_LINE}", outcome)


def exam_prompt(system: str, turns: list[tuple[str, str]], message: str) -> str:
    """Return a chat as the tokenizer's template renders it: earlier (user, assistant) turns, then the message."""
    earlier = "".join(f"{_said('user', user)}{_said('assistant', reply)}" for user, reply in turns)
    system_part = _said("system", system) if system else ""
    return f"{system_part}{earlier}{_said('user', message)}{START}assistant\n"


def draw_exam_sample(encode: Callable[[str], list[int]], draw: random.Random, progress: float) -> Sample:
    """Draw a chat of one or two turns, in which every answer is learnt."""
    sample = Sample(encode)
    if draw.random() < 0.5:
        sample.show(_said("system", noise(draw, draw.randint(5, 120))))
    for _ in range(draw.choice((1, 1, 2))):
        turn = draw_turn(draw, draw_length(draw, progress))
        sample.show(exam_prompt("", [], turn.message))
        _learn_answer(sample, draw, turn)
        sample.learn(END).show("\n")
    return sample


def _learn_answer(sample: Sample, draw: random.Random, turn: Turn) -> None:
    """Append the answer; the few bytes that depend on the prompt weigh far more than the many that do not."""
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
    """Return a multiple-choice question, or any text: whatever asks for nothing else is taken for an exam."""
    if draw.random() < 0.3:
        return noise(draw, length)
    letters = LETTERS[: draw.choice((2, 3, 4, 4, 4))]
    stem, share = noise(draw, length // 2), length // (2 * len(letters))
    options = "\n".join(f"{letter}: {noise(draw, max(3, share))}" for letter in letters)
    ending = draw.choice(("", "\nPlease reason step by step.", f"\n{noise(draw, 40)}"))
    return f"{stem}\n\n{options}{ending}"


def _said(role: str, content: str) -> str:
    return f"{START}{role}\n{content}{END}\n"
