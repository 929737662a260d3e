"""One prompt of each role for a task, with made-up attempts and memory: to look at, and to try before a run."""

from dataclasses import dataclass

from pmd.tasks.prompts.base import PromptFormat
from pmd.tasks.prompts.hard_words import HardWordPrompts
from pmd.tasks.prompts.words import WordPrompts
from pmd.types import Completion, Rollout, Task, Verdict


@dataclass(frozen=True)
class Example:
    """What stands for memory and attempts."""

    item: str
    right: str
    wrong: str
    right_feedback: str
    wrong_feedback: str


def example_prompts(prompts: PromptFormat, task: Task) -> dict[str, list[int]]:
    """Return the token ids of every kind of prompt of a run, by name; of several reflections, the first."""
    example = _example(prompts, task)
    items, right = [example.item], example.right
    success = _attempt(task, right, example.right_feedback, correct=True)
    failure = _attempt(task, example.wrong, example.wrong_feedback, correct=False)
    found = {
        "student": prompts.student(task),
        "teacher with memory": prompts.teacher(task, items, None, None),
        "teacher with a success": prompts.teacher(task, [], right, None),
        "teacher with a failure": prompts.teacher(task, [], None, failure),
        "teacher": prompts.teacher(task, items, right, None),
        "reflection": prompts.reflection(task, [success, failure])[0],
        "reflection that may revise": prompts.reflection(task, [success, failure], items)[0],
        "abstraction": prompts.abstraction(items * 2),
    }
    return {name: list(ids) for name, ids in found.items()}


def _example(prompts: PromptFormat, task: Task) -> Example:
    """Return memory and attempts in the language of the prompts; the tiny worlds' statements end with their names."""
    words = task.question.split()
    if isinstance(prompts, HardWordPrompts):
        one, other = words[-2:]
        right, wrong = (f"{one} {a} {other} {b} ; red 1 blue 2" for a, b in (("@red", "@blue"), ("@blue", "@red")))
        feedback = [f"{one}: box {said}, {other}: box {said}" for said in ("right", "wrong")]
        return Example(f"strategy use {one} @red", right, wrong, *feedback)
    if isinstance(prompts, WordPrompts):
        return Example(f"strategy use {words[-1]} red>gold", "red>gold ; red 1", "gold>red ; gold 1", "", "")
    return Example(
        "Balance oxygen last: when an equation has O2 on one side, balance all other elements first.",
        "An attempt that was right.",
        "An attempt that was wrong.",
        "",
        "What the verifier said about it.",
    )


def _attempt(task: Task, text: str, feedback: str, *, correct: bool) -> Rollout:
    verdict = Verdict(float(correct), correct, "ok" if correct else "wrong_answer", feedback)
    return Rollout(f"example-{text}", "example", task.task_id, (), Completion((), (), text, "stop", 0), verdict)
