"""What may enter the memory, what is a duplicate, what leaves."""

import pytest
from memory_world import make_rollout, make_task

from pmd.errors import MemoryStoreError
from pmd.memory.update import open_writer
from pmd.types import Message, Task


def one_task(store, **fields):
    with open_writer(store) as writer:
        return writer.add_task(make_task(**fields))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_tasks_are_refused_and_leave_nothing(open_store, split):
    store = open_store()

    def write_both():
        with open_writer(store) as writer:
            writer.add_task(make_task("fine"))
            writer.add_task(make_task("held-out", split))

    with pytest.raises(MemoryStoreError, match=f"split={split}; memory keeps training tasks only"):
        write_both()
    assert store.generation == 0
    assert store.tasks() == []


def test_the_schema_itself_refuses_held_out_tasks(open_store):
    store = open_store()
    one_task(store)
    with pytest.raises(MemoryStoreError, match="CHECK constraint"), open_writer(store) as writer:
        writer.ledger.db.execute("UPDATE tasks SET split = 'test'")


def test_a_task_is_added_once_and_its_id_names_one_text(open_store):
    store = open_store()
    first = one_task(store)
    assert one_task(store) == first
    with pytest.raises(MemoryStoreError, match="task_id=t has another text"):
        one_task(store, key="something else")


def test_a_task_without_a_memory_key_is_looked_up_by_its_question(open_store):
    store = open_store()
    with open_writer(store) as writer:
        writer.add_task(Task("t", (Message("user", "which gate"),), "exact", "train", answer="left"))
    assert [task.memory_key for task in store.tasks()] == ["which gate"]


def test_successes_are_distinct_and_the_oldest_leaves(open_store):
    store = open_store(experiences_per_task=2)
    task_row = one_task(store)
    with open_writer(store) as writer:
        ids = [writer.add_experience(task_row, make_rollout(text=text), n) for n, text in enumerate("aabc")]
    assert ids[0] == ids[1]
    assert [experience.response for experience in store.experiences()] == ["b", "c"]
    assert store.experiences(None) == store.experiences()  # a retired attempt that nothing rests on is deleted


def test_failures_are_distinct_by_error(open_store):
    store = open_store()
    task_row = one_task(store)
    with open_writer(store) as writer:
        for text, answer in (("x", "1"), ("y", "1"), ("z", "2")):
            writer.add_experience(task_row, make_rollout(text=text, correct=False, answer=answer), 0)
        for feedback in ("no brackets", "no brackets", "too long"):
            rollout = make_rollout(text="w", correct=False, feedback=feedback, status="format")
            writer.add_experience(task_row, rollout, 0)
    assert [(e.response, e.feedback, e.support) for e in store.experiences()] == [
        ("x", "", 2), ("z", "", 1), ("w", "no brackets", 2), ("w", "too long", 1),
    ]  # fmt: skip


def test_the_first_200_characters_of_the_feedback_tell_failures_apart(open_store):
    store = open_store()
    task_row = one_task(store)
    with open_writer(store) as writer:
        for feedback in ("." * 199 + "a", "." * 199 + "b", "." * 200 + "a", "." * 200 + "b"):
            rollout = make_rollout(text="w", correct=False, feedback=feedback, status="format")
            writer.add_experience(task_row, rollout, 0)
    assert [e.support for e in store.experiences()] == [1, 1, 2]


@pytest.mark.parametrize(
    "rollout", [make_rollout(status="sandbox_error", correct=False), make_rollout(text="<think> on and on"),
                make_rollout(text="  ")]
)  # fmt: skip
def test_what_says_nothing_is_not_kept(open_store, rollout):
    store = open_store()
    task_row = one_task(store)
    with open_writer(store) as writer:
        assert writer.add_experience(task_row, rollout, 0) is None
    assert store.experiences(None) == []


def test_an_insight_written_again_gains_support_and_evidence(open_store):
    store = open_store()
    task_row = one_task(store)
    with open_writer(store) as writer:
        attempts = [writer.add_experience(task_row, make_rollout(text=text), 0) for text in "ab"]
        first = writer.add_insight(task_row, "strategy", "use  it", policy_version=0, parents=attempts[:1])
        second = writer.add_insight(task_row, "strategy", "use it ", policy_version=3, parents=attempts[1:])
        assert writer.add_insight(task_row, "contrast", "use it", policy_version=3) != first
    assert first == second
    assert store.insights()[0].support == 2
    assert store.query("SELECT parent_id FROM links WHERE child_id = ? ORDER BY 1", first) == [(i,) for i in attempts]


def test_lessons_do_not_drive_out_a_strategy(open_store):
    store = open_store(insights_per_task=3)
    task_row = one_task(store)
    with open_writer(store) as writer:
        writer.add_insight(task_row, "strategy", "do", policy_version=0)
        for n in range(5):
            writer.add_insight(task_row, "lesson", f"not {n}", policy_version=0)
    assert [insight.text for insight in store.insights()] == ["do", "not 3", "not 4"]


def test_of_kinds_that_are_as_frequent_the_lesson_goes_first(open_store):
    store = open_store(insights_per_task=2)
    task_row = one_task(store)
    with open_writer(store) as writer:
        for kind in ("strategy", "lesson", "lesson", "contrast"):  # the lesson has the most support
            writer.add_insight(task_row, kind, f"the {kind}", policy_version=0)
    assert [insight.text for insight in store.insights()] == ["the strategy", "the contrast"]


def test_the_cap_never_retires_the_insight_just_written(open_store):
    store = open_store(insights_per_task=2)
    task_row = one_task(store)
    with open_writer(store) as writer:
        for text in ("do this", "do this", "do that", "do that", "do the other"):
            writer.add_insight(task_row, "strategy", text, policy_version=0)
    assert [insight.text for insight in store.insights()] == ["do that", "do the other"]


def test_a_retired_insight_comes_back_and_ids_are_never_reused(open_store):
    store = open_store(insights_per_task=1)
    task_row = one_task(store)
    with open_writer(store) as writer:
        first = writer.add_insight(task_row, "lesson", "a", policy_version=0)
        second = writer.add_insight(task_row, "lesson", "b", policy_version=0)
        assert writer.add_insight(task_row, "lesson", "a", policy_version=0) == first
    assert [insight.id for insight in store.insights()] == [first]
    with open_writer(store) as writer:
        old = [writer.add_experience(task_row, make_rollout(text=str(n)), n) for n in range(6)]
    with open_writer(store) as writer:
        assert writer.add_experience(task_row, make_rollout(text="new"), 9) == max(old) + 1
    assert second not in [insight.id for insight in store.insights()]


def test_capacity_retires_old_copies_before_anything_else(open_store):
    store = open_store(capacity=3)
    rows = [one_task(store, task_id=str(n)) for n in range(3)]
    with open_writer(store) as writer:
        writer.add_insight(rows[0], "lesson", "unique and oldest", policy_version=0)
        for task_row in rows:
            writer.add_insight(task_row, "strategy", "the same", policy_version=0)
    assert [(i.task_row, i.text) for i in store.insights()] == [
        (rows[0], "unique and oldest"), (rows[1], "the same"), (rows[2], "the same"),
    ]  # fmt: skip


def test_insights_must_be_usable(open_store):
    store = open_store()
    task_row = one_task(store)
    for kind, text in (("strategy", "  "), ("behaviour", "x")):
        with pytest.raises(MemoryStoreError, match="kind"), open_writer(store) as writer:
            writer.add_insight(task_row, kind, text, policy_version=0)
    with pytest.raises(MemoryStoreError, match="task_row=99 is not in the store"), open_writer(store) as writer:
        writer.add_insight(99, "strategy", "x", policy_version=0)


@pytest.mark.parametrize(
    ("answer", "text", "leaks"),
    [
        ("sodium chloride", "It is Sodium  Chloride.", True),
        ("sodium chloride", "think of chloride, of sodium", False),
        ("B", "The answer is B.", True),
        ("B", "Compare option B with the rest", True),
        ("B", "Vitamin B is soluble", False),
        ("7", "look at group 7", False),
        ("", "anything", False),
    ],
)
def test_a_stated_answer_is_a_leak(open_store, answer, text, leaks):
    store = open_store()
    with open_writer(store) as writer:
        writer.add_insight(writer.add_task(make_task(answer=answer)), "strategy", text, policy_version=0)
    assert len(store.insights("quarantined")) == leaks
    assert len(store.insights()) == (not leaks)


def test_a_leaking_insight_is_quarantined_for_good(open_store):
    store = open_store()
    task_row = one_task(store, answer="sodium chloride")
    with open_writer(store) as writer:
        writer.add_insight(task_row, "strategy", "say sodium chloride", policy_version=0)
        writer.add_insight(task_row, "strategy", "say sodium chloride", policy_version=1)
    assert store.insights() == []
    assert [i.leak for i in store.insights("quarantined")] == ["states the answer"]


def test_each_change_is_logged_with_what_it_replaced(open_store):
    store = open_store()
    task_row = one_task(store)
    with open_writer(store) as writer:
        insight = writer.add_insight(task_row, "lesson", "a", policy_version=0)
    with open_writer(store) as writer:
        writer.set_status(1, insight, "retired", "harmful")
        writer.set_status(1, insight, "retired", "harmful")  # no change, no entry
    assert store.query("SELECT generation, action, before, after, reason FROM ops") == [
        (2, "add", None, None, "reflection"),
        (3, "change", '{"status": "active"}', '{"status": "retired"}', "harmful"),
    ]


# What a model is likeliest to copy: code, a solution, and the tests of a programming task.

STDIN = {
    "kind": "stdin",
    "cases": [{"input": "8\n31 41 59 26 53 58 97 93\n", "output": "458"}, {"input": "1\n5\n", "output": "5"}],
}
FUNCTIONAL = {
    "kind": "functional",
    "entry": "total",
    "cases": [{"args": [[31, 41, 59, 26, 53, 58, 97, 93]], "expected": 458}],
}


def program(tests, question: str = "Print the sum of the numbers.") -> Task:
    return Task("t", (Message("user", question),), "code", "train", tests=tests)


def leak(open_store, task: Task, text: str, *, again: bool = False) -> str:
    """Write one insight of the task, `again` in a later update; return why it was stopped."""
    store = open_store()
    with open_writer(store) as writer:
        task_row = writer.add_task(task)
        if not again:
            writer.add_insight(task_row, "strategy", text, policy_version=0)
    if again:
        with open_writer(store) as writer:
            writer.add_insight(writer.add_task(task), "strategy", text, policy_version=1)
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
    assert leak(open_store, program(tests), text, again=again) == leaks


def test_what_the_task_itself_says_may_be_said(open_store):
    question = "Print the sum. Example: 8, then 31 41 59 26 53 58 97 93, gives 458."
    assert leak(open_store, program(STDIN, question), "As for 31 41 59 26 53 58 97 93, add them.") == ""


def test_a_solution_is_not_quoted(open_store):
    store = open_store()
    solution = "read n then the numbers, keep a running total and print it at the end"
    with open_writer(store) as writer:
        task_row = writer.add_task(program(STDIN))
        writer.add_experience(task_row, make_rollout("t", solution), 0)
        writer.add_insight(task_row, "strategy", f"Do this: {solution}.", policy_version=0)
        writer.add_insight(task_row, "strategy", "Keep a running total.", policy_version=0)
    assert [insight.leak for insight in store.insights(None)] == ["quotes a solution", ""]


@pytest.mark.parametrize(("num_words", "leaks"), [(1, ""), (7, ""), (8, "quotes a solution")])
def test_eight_words_in_a_row_are_a_quotation(open_store, num_words, leaks):
    store = open_store()
    solution = "read n then the numbers, keep a running total and print it at the end"
    with open_writer(store) as writer:
        task_row = writer.add_task(program(STDIN))
        writer.add_experience(task_row, make_rollout("t", solution), 0)
        writer.add_insight(task_row, "strategy", " ".join(solution.split()[-num_words:]), policy_version=0)
    assert [insight.leak for insight in store.insights(None)] == [leaks]


def test_an_edit_carries_the_evidence_over_and_retires_the_old_text(open_store):
    store = open_store()
    task_row = one_task(store)
    with open_writer(store) as writer:
        one, two, three = (writer.add_experience(task_row, make_rollout(text=text), 0) for text in "abc")
        old = writer.add_insight(task_row, "strategy", "Add.", policy_version=0, parents=[one])
        known = writer.add_insight(task_row, "strategy", "Add all.", policy_version=0, parents=[two])
        assert writer.edit_insight(old, " Add  all. ", policy_version=1, parents=[three]) == known
        new = writer.edit_insight(known, "Add all of them.", policy_version=2)
    rows = store.query("SELECT id, status, version, previous_id, support FROM insights ORDER BY id")
    assert [row[:2] for row in rows] == [(old, "retired"), (known, "retired"), (new, "active")]
    assert rows[2] == (new, "active", 2, known, 2)
    parents = "SELECT parent_id FROM links WHERE child_level = 1 AND child_id = ? ORDER BY parent_id"
    assert store.query(parents, known) == store.query(parents, new) == [(one,), (two,), (three,)]


@pytest.mark.parametrize(("insight_id", "text"), [(1, "  "), (99, "Add.")])
def test_an_edit_needs_an_insight_and_a_text(open_store, insight_id, text):
    store = open_store()
    task_row = one_task(store)
    with open_writer(store) as writer:
        assert writer.add_insight(task_row, "strategy", "Add.", policy_version=0) == 1
        with pytest.raises(MemoryStoreError, match=f"insight={insight_id} cannot become"):
            writer.edit_insight(insight_id, text, policy_version=1)


def test_an_edit_is_filtered_like_an_addition(open_store):
    store = open_store()
    with open_writer(store) as writer:
        task_row = writer.add_task(program(STDIN))
        first = writer.add_insight(task_row, "strategy", "Add them up.", policy_version=0)
        writer.edit_insight(first, "Test it on 31 41 59 26 53 58 97 93.", policy_version=1)
    assert store.insights() == []
    assert [insight.leak for insight in store.insights("quarantined")] == ["quotes a test"]


@pytest.mark.parametrize(("first", "leaks"), [(10, "quotes a test"), (600_010, "")])
def test_tests_of_megabytes_are_looked_at_in_part(open_store, first, leaks):
    """LiveCodeBench has tests of megabytes; what no model is shown of them no insight can quote."""
    tests = {"kind": "stdin", "cases": [{"input": " ".join(map(str, range(700_000))), "output": "1"}] * 20}
    text = "Mind " + " ".join(map(str, range(first, first + 9)))
    assert leak(open_store, program(tests), text) == leaks
