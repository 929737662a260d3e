"""What the exam model can write, and the noise it learns to ignore. No torch.

It knows the format of an exam answer and a handful of study tips, but no science. It picks letters uniformly, so a run
on real questions exercises the whole loop at chance level.
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
    "I compare the options.",
    "Units tell most of it.",
    "One key word decides.",
    "Only one option fits.",
    "The definition settles this.",
    "Some can be ruled out.",
)
TIPS = (
    ("Read twice", "Go over the question again first."),
    ("Mind negation", "Look for words such as not or except."),
    ("Check units", "Carry the units along to the end."),
    ("Eliminate first", "Strike out what cannot be true."),
    ("Orders of magnitude", "Estimate the size before computing."),
    ("Limiting cases", "Try the smallest and the largest case."),
    ("Draw it", "Make a small sketch and label it."),
    ("Name the concept", "Say which law is asked about."),
    ("Pairs", "Ask what tells two like options apart."),
    ("Beware absolutes", "Distrust always and never."),
    ("Use symmetry", "See what stays the same when swapped."),
    ("Quantities", "Count atoms, charges and signs twice."),
    ("Work backwards", "Start from an option and test it."),
    ("Assumptions", "Write down what is taken for granted."),
    ("Keep it simple", "Prefer the short explanation."),
    ("Just one step", "Do one step per line."),
    ("Form", "Give the answer as it is asked for."),
    ("Test exceptions", "Think of cases that break the rule."),
    ("Hidden traps", "Doubt an option that looks right at once."),
    ("Verify", "Put the choice back into the question."),
)
_HERE = Path(__file__).parent
WORDS = tuple((_HERE / "exam_words.txt").read_text(encoding="utf-8").split())
SYMBOLS = (*(_HERE / "exam_symbols.txt").read_text(encoding="utf-8").split(), "\n")
CHARACTERS = string.ascii_letters + string.digits


def exam_answer(phrase: str) -> tuple[str, str]:
    """Return the text before and after the letter."""
    return f"<reasoning>\n{phrase}\n</reasoning>\n<answer>\n", "\n</answer>"


def reflection_answer(kind: str, tip: tuple[str, str]) -> str:
    """Return one item as a fenced JSON object."""
    return _fenced({"kind": kind, "title": tip[0], "content": tip[1]})


def abstraction_answer(tip: tuple[str, str]) -> str:
    """Return one pattern as a fenced JSON object."""
    return _fenced({"title": tip[0], "content": tip[1]})


def noise(draw: random.Random, length: int) -> str:
    """Return about `length` bytes of meaningless text: words, syllables, digits, symbols, line breaks."""
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
