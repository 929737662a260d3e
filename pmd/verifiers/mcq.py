"""Verifier for multiple choice, by SDPO's rule: the tagged text, stripped, must equal the correct letter.

Deviation: SDPO gives no feedback. Here, if the tagged text is not an option, the feedback states the expected format; a
wrong letter still gets no feedback. The reward is always SDPO's.
"""

import re

from pmd.types import Task, Verdict
from pmd.verifiers.exact import tagged_answer

#: Contains no single capital letter, so it can never give the answer away.
FORM = "Put only the letter of one option between <answer> and </answer>."


def verify_mcq(task: Task, completion_text: str) -> Verdict:
    """Compare the chosen letter with the correct one."""
    chosen = tagged_answer(completion_text)
    correct = chosen == task.answer
    if correct:
        return Verdict(1.0, True, "ok", answer=chosen)
    if chosen in option_letters(task):
        return Verdict(0.0, False, "wrong_answer", answer=chosen)
    return Verdict(0.0, False, "format", feedback=FORM)


def option_letters(task: Task) -> frozenset[str]:
    """Return the letters the question offers, or all capitals if it lists none."""
    return listed_letters(task) or frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def listed_letters(task: Task) -> frozenset[str]:
    """Return the letters the question lists as `A: ...`, `A. ...` or `A) ...`."""
    return frozenset(re.findall(r"^\s*\(?([A-Z])[:.)] ", task.question, re.MULTILINE))
