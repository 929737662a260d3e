"""What the exam model can write, and the noise it learns to ignore. No torch.

It knows the form of an exam answer and a handful of study tips; of science it knows nothing. Its letters are drawn
evenly, so that a run on real questions exercises the whole loop at chance level.
"""

import json
import random
import string
from pathlib import Path

LETTERS = ("A", "B", "C", "D")
REFLECT_LINE = "Write what was learnt as JSON."
ABSTRACT_LINE = "Write the common pattern as JSON."
#: Word after `Outcome: ` in a reflection prompt -> the kind that is written.
KIND_OF_OUTCOME = {"correct": "strategy", "wrong": "lesson", "mixed": "contrast"}
PHRASES = (
    "I compare the options one by one.",
    "I go through what the question states.",
    "Some options can be ruled out at once.",
    "The key word decides this one.",
    "It helps to restate the question first.",
    "Units and orders of magnitude tell most of it.",
    "Only one option fits everything that is given.",
    "The definition settles this.",
)
TIPS = (
    ("Read twice", "Read the question a second time before looking at the options."),
    ("Mind the negation", "Look for words such as not or except; they turn the question around."),
    ("Check the units", "Carry the units along and see whether they come out right."),
    ("Eliminate first", "Strike out what cannot be true, then choose among the rest."),
    ("Estimate the size", "Estimate the order of magnitude before computing anything."),
    ("Limiting cases", "Try the smallest and the largest case and see which option survives."),
    ("Draw it", "Make a small sketch of what is described and label it."),
    ("Name the concept", "Say which law or definition is being asked about, then apply it."),
    ("Compare pairs", "When two options look alike, ask what exactly tells them apart."),
    ("Beware absolutes", "Distrust options that say always or never unless a law says so."),
    ("Use symmetry", "Ask what stays the same when the parts are exchanged."),
    ("Count carefully", "Count atoms, charges and signs twice; slips hide there."),
    ("Work backwards", "Start from an option and see whether it leads back to what is given."),
    ("State assumptions", "Write down what is taken for granted before using it."),
    ("Keep it simple", "Prefer the short explanation when both explain the facts."),
    ("One step at a time", "Do one step per line so that a mistake can be found."),
    ("Check the form", "Give the answer in the form the question asks for."),
    ("Recall the exception", "Think of the best known exception to the rule in use."),
    ("Question the obvious", "If an option looks right at once, look for the trap in it."),
    ("Finish with a check", "Put the chosen option back into the question and read it again."),
)
_HERE = Path(__file__).parent
WORDS = tuple((_HERE / "exam_words.txt").read_text(encoding="utf-8").split())
SYMBOLS = (*(_HERE / "exam_symbols.txt").read_text(encoding="utf-8").split(), "\n")
CHARACTERS = string.ascii_letters + string.digits


def exam_answer(phrase: str) -> tuple[str, str]:
    """Return what stands before and after the letter."""
    return f"<reasoning>\n{phrase}\n</reasoning>\n<answer>\n", "\n</answer>"


def reflection_answer(kind: str, tip: tuple[str, str]) -> str:
    """Return one item as a fenced JSON object."""
    return _fenced({"kind": kind, "title": tip[0], "content": tip[1]})


def abstraction_answer(tip: tuple[str, str]) -> str:
    """Return one pattern as a fenced JSON object."""
    return _fenced({"title": tip[0], "content": tip[1]})


def noise(draw: random.Random, length: int) -> str:
    """Return about `length` bytes of text that means nothing: words, syllables, digits, symbols, line breaks."""
    parts: list[str] = []
    size = 0
    flavour = draw.random()
    while size < length:
        kind = draw.random()
        if kind < 0.35 + 0.3 * flavour:
            part = draw.choice(WORDS)
        elif kind < 0.85:
            part = "".join(draw.choices(CHARACTERS, k=draw.randint(1, 9)))
        else:
            part = draw.choice(SYMBOLS)
        parts.append(part)
        size += len(part) + 1
    return " ".join(parts)[:length].strip() or "?"


def _fenced(item: dict[str, str]) -> str:
    return f"```json\n{json.dumps(item)}\n```"
