"""Exact text: the tagged text of the completion (all of it without tags), stripped, must equal the answer."""

from pmd.types import Task, Verdict
from pmd.verifiers.tags import tagged_answer


def verify_exact(task: Task, completion_text: str) -> Verdict:
    """Compare character by character, blind only to blanks at both ends."""
    given = tagged_answer(completion_text)
    if given == task.answer.strip():
        return Verdict(1.0, True, "ok", answer=given)
    if not given:
        return Verdict(0.0, False, "format", feedback="The completion holds no answer.")
    return Verdict(0.0, False, "wrong_answer", answer=given)
