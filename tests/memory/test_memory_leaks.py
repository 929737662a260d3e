"""The leak filter on what a model is likeliest to copy: code, a solution, and the tests of a programming problem."""

import pytest
from memory_world import make_rollout

from pmd.memory.update import open_writer
from pmd.types import Message, Task

STDIN = {
    "kind": "stdin",
    "cases": [{"input": "8\n31 41 59 26 53 58 97 93\n", "output": "458"}, {"input": "1\n5\n", "output": "5"}],
}
FUNCTIONAL = {
    "kind": "functional",
    "entry": "total",
    "cases": [{"args": [[31, 41, 59, 26, 53, 58, 97, 93]], "expected": 458}],
}


def task(tests, question: str = "Print the sum of the numbers.") -> Task:
    return Task("t", (Message("user", question),), "code", "train", tests=tests)


def reason(open_store, problem: Task, text: str, *, again: bool = False) -> str:
    """Write one insight of the problem, `again` in a later update; return why it was stopped."""
    store = open_store()
    with open_writer(store) as writer:
        task_row = writer.add_task(problem)
        if not again:
            writer.add_insight(task_row, "strategy", text, policy_version=0)
    if again:
        with open_writer(store) as writer:
            writer.add_insight(writer.add_task(problem), "strategy", text, policy_version=1)
    found = store.insights(None)
    assert [insight.status for insight in found] == ["quarantined" if found[0].leak else "active"]
    return found[0].leak


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("tests", [STDIN, FUNCTIONAL])
@pytest.mark.parametrize(
    ("text", "leaks"),
    [
        ("Check with 31 41 59 26 53 58 97 93 first.", "quotes a test"),
        ("For 31, 41, 59, 26, 53, 58, 97, 93 print 458.", "quotes a test"),
        ("Read the whole line, then add the numbers up in one pass.", ""),
        ("With 31 41 59 the sum is 131.", ""),  # an example of one's own
        ("Use ```python\nprint(sum(map(int, input().split())))\n```", "contains code"),
    ],
)
def test_the_tests_of_a_program_are_not_quoted(open_store, tests, text, leaks, again):
    assert reason(open_store, task(tests), text, again=again) == leaks


def test_what_the_problem_itself_says_may_be_said(open_store):
    question = "Print the sum. Example: 8, then 31 41 59 26 53 58 97 93, gives 458."
    assert reason(open_store, task(STDIN, question), "As for 31 41 59 26 53 58 97 93, add them.") == ""


def test_a_solution_is_not_quoted(open_store):
    store = open_store()
    solution = "read n then the numbers, keep a running total and print it at the end"
    with open_writer(store) as writer:
        task_row = writer.add_task(task(STDIN))
        writer.add_experience(task_row, make_rollout("t", solution), 0)
        writer.add_insight(task_row, "strategy", f"Do this: {solution}.", policy_version=0)
        writer.add_insight(task_row, "strategy", "Keep a running total.", policy_version=0)
    assert [insight.leak for insight in store.insights(None)] == ["quotes a solution", ""]


def test_an_edit_is_filtered_like_an_addition(open_store):
    store = open_store()
    with open_writer(store) as writer:
        task_row = writer.add_task(task(STDIN))
        first = writer.add_insight(task_row, "strategy", "Add them up.", policy_version=0)
        writer.edit_insight(first, "Test it on 31 41 59 26 53 58 97 93.", policy_version=1)
    assert store.insights() == []
    assert [insight.leak for insight in store.insights("quarantined")] == ["quotes a test"]


@pytest.mark.parametrize(("first", "leaks"), [(10, "quotes a test"), (600_010, "")])
def test_tests_of_megabytes_are_looked_at_in_part(open_store, first, leaks):
    """LiveCodeBench has tests of megabytes; what no model is shown of them no insight can quote."""
    tests = {"kind": "stdin", "cases": [{"input": " ".join(map(str, range(700_000))), "output": "1"}] * 20}
    text = "Mind " + " ".join(map(str, range(first, first + 9)))
    assert reason(open_store, task(tests), text) == leaks
