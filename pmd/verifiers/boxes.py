"""Verifiers of the tiny worlds: the digits of the two right boxes, in order, after a single `;`.

Boxes show distinct digits, so two right digits come from the right rule and not from luck.
"""

from dataclasses import replace

from pmd.tasks.prompts.words import EOS
from pmd.tiny.world import DIGITS
from pmd.types import Task, Verdict


def verify_boxes(task: Task, completion_text: str) -> Verdict:
    """Compare the two digits after `;` with the task's answer, ignoring all other words."""
    words = completion_text.removesuffix(EOS).split()
    digits = [word for word in words[words.index(";") + 1 :] if word in DIGITS] if words.count(";") == 1 else []
    if len(digits) != 2:
        return Verdict(0.0, False, "format", feedback="Give two digits after a single ; .")
    given = " ".join(digits)
    if given == task.answer:
        return Verdict(1.0, True, "ok", feedback="Right boxes.", answer=given)
    return Verdict(0.0, False, "wrong_answer", feedback="These are not the boxes that the plan means.", answer=given)


def verify_each_box(task: Task, completion_text: str) -> Verdict:
    """Like `verify_boxes`, for plans of two names: the feedback says which of the two boxes was right."""
    verdict = verify_boxes(task, completion_text)
    if verdict.answer is None:
        return verdict
    right = [given == wanted for given, wanted in zip(verdict.answer.split(), task.answer.split(), strict=True)]
    first, second = ("right" if each else "wrong" for each in right)
    return replace(verdict, feedback=f"First box {first}, second box {second}.")
