"""Verifier for exact text: the completion's `<answer>` must equal the task's answer."""

from pmd.types import Task, Verdict


def tagged_answer(completion_text: str) -> str:
    """Return the text after the last `<answer>` up to the next `</answer>`, stripped.

    Tags are optional: without `<answer>` the answer starts with the completion, without `</answer>` it ends with it.
    """
    return completion_text.rsplit("<answer>", 1)[-1].split("</answer>", 1)[0].strip()


def verify_exact(task: Task, completion_text: str) -> Verdict:
    """Compare character by character, ignoring only white space at both ends."""
    given = tagged_answer(completion_text)
    if given == task.answer.strip():
        return Verdict(1.0, True, "ok", answer=given)
    if not given:
        return Verdict(0.0, False, "format", feedback="The completion contains no answer.")
    return Verdict(0.0, False, "wrong_answer", answer=given)
