"""Multiple choice by SDPO's rule: the tagged text, stripped, must equal the right letter; reward 1.0 or 0.0.

Deviation: SDPO gives no words back. A completion whose tagged text is no option at all is told the form that is
wanted; a wrong letter is told nothing. The reward is SDPO's in every case.
"""

import re

from pmd.types import Task, Verdict
from pmd.verifiers.tags import tagged_answer

#: No capital letter of an option stands in it, so it can never give the answer away.
FORM = "Put only the letter of one option between <answer> and </answer>."


def verify_mcq(task: Task, completion_text: str) -> Verdict:
    """Compare the chosen letter with the right one."""
    chosen = tagged_answer(completion_text)
    correct = chosen == task.answer
    if correct:
        return Verdict(1.0, True, "ok", answer=chosen)
    if chosen in option_letters(task):
        return Verdict(0.0, False, "wrong_answer", answer=chosen)
    return Verdict(0.0, False, "format", feedback=FORM)


def option_letters(task: Task) -> frozenset[str]:
    """Return the letters that the question offers; all capitals if it lists none."""
    return listed_letters(task) or frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def listed_letters(task: Task) -> frozenset[str]:
    """Return the letters that the question lists as `A: ...`, `A. ...` or `A) ...`."""
    return frozenset(re.findall(r"^\s*\(?([A-Z])[:.)] ", task.question, re.MULTILINE))
