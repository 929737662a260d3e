"""Verifier for mathematics: compares the final answer of a completion with the task's answer, exactly.

What counts as the same answer is one rule for each kind (`mathematics/compare.py` has the table). Numbers are compared
exactly, never after rounding: 0.333 is not 1/3. A unit on one side only is ignored, two units must agree; `50\\%` is
1/2 and not 50; `42_7` equals neither `42_8` nor 42; letters keep case and order; words count. Answers are read by our
own parser, which refuses what it does not know. Only integrals, sums, limits and the like go to sympy.

A wrong answer's feedback says how it was read (`parsed answer`). How the task's answer was read is in the verdict's
`explanation`, which `pmd score` and `pmd inspect` show and no prompt ever holds.

The text is untrusted and computing may take forever, so it happens in helper processes with a deadline
(`math_helpers.py`).
"""

from collections.abc import Iterable

from pmd.tasks.lines import shorten
from pmd.types import Task, Verdict
from pmd.verifiers.exact import tagged_answer
from pmd.verifiers.math_helpers import HELPERS

#: Only this much of the end is read, because reading time grows with length; it fits any final answer.
MAX_CHARACTERS = 20_000
MAX_SHOWN = 200  # characters of an answer in feedback and explanation
WRONG = "The final answer is not right."
NO_ANSWER = "No mathematical answer was found; put it into \\boxed{}."
TOO_SLOW = "The final answer took too long to check; write it in a simpler form."


def verify_math(task: Task, completion_text: str) -> Verdict:
    """Compare the last answer of the completion (of its `<answer>` part, if any) with the task's answer."""
    is_tagged = "<answer>" in completion_text
    text = tagged_answer(completion_text) if is_tagged else completion_text
    reply = HELPERS.ask({"gold": task.answer, "text": _encodable(text[-MAX_CHARACTERS:]), "is_tagged": is_tagged})
    if reply is None:
        return Verdict(0.0, False, "timeout", feedback=TOO_SLOW)
    answer, gold = reply["answer"], _shown(reply["gold"])
    if answer is None:
        return Verdict(0.0, False, "format", feedback=NO_ANSWER, explanation=f"parsed gold: {gold}")
    explanation = f"parsed gold: {gold}; parsed answer: {_shown(answer)}"
    if reply["correct"]:
        return Verdict(1.0, True, "ok", answer=answer, explanation=explanation)
    feedback = f"{WRONG} parsed answer: {_shown(answer)}"
    return Verdict(0.0, False, "wrong_answer", feedback, answer, explanation=explanation)


def describe_gold_problems(tasks: Iterable[Task]) -> list[str]:
    """Return a sentence for each task whose answer this verifier cannot judge."""
    tasks = list(tasks)
    problems = HELPERS.describe_gold_problems([task.answer for task in tasks])
    return [
        f"{task.place or f'task {shorten(task.task_id)}'}: answer={shorten(task.answer)}: {problem}, so verifier "
        "`math` cannot judge it; correct it, use verifier `exact`, or remove the task."
        for task, problem in zip(tasks, problems, strict=True)
        if problem
    ]


def _encodable(text: str) -> str:
    """Replace half characters, which no file could hold."""
    return text.encode(errors="replace").decode()


def _shown(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
