"""One prompt of each role for a task, with made-up attempts and memory: to look at, and to try before a run."""

from pmd.tasks.prompts.base import PromptFormat
from pmd.tasks.prompts.words import WordPrompts, parse_statement
from pmd.types import Completion, Rollout, Task, Verdict

#: What stands for memory and attempts where prompts are made of ordinary text.
ITEM = "Balance oxygen last: when an equation has O2 on one side, balance all other elements first."
ATTEMPTS = ("An attempt that was right.", "An attempt that was wrong.")
FEEDBACK = "What the verifier said about it."


def example_prompts(prompts: PromptFormat, task: Task) -> dict[str, list[int]]:
    """Return the token ids of every kind of prompt of a run, by name."""
    items, (right, wrong) = [ITEM], ATTEMPTS
    if isinstance(prompts, WordPrompts):
        puzzle = parse_statement(task.question)
        name = puzzle.name if puzzle is not None else ""
        items, right, wrong = [f"strategy use {name} red>gold"], "red>gold ; red 1", "gold>red ; gold 1"
    success, failure = _attempt(task, right, correct=True), _attempt(task, wrong, correct=False)
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


def _attempt(task: Task, text: str, *, correct: bool) -> Rollout:
    verdict = Verdict(float(correct), correct, "ok" if correct else "wrong_answer", "" if correct else FEEDBACK)
    return Rollout(f"example-{text}", "example", task.task_id, (), Completion((), (), text, "stop", 0), verdict)
