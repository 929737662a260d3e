"""What may enter the memory, what is a duplicate, what leaves."""

import pytest
from memory_world import make_rollout, make_task
from pmd.memory.leaks import answer_words, fingerprint, leak_reason
from pmd.memory.write import without_thinking

from pmd.errors import MemoryStoreError
from pmd.memory.update import open_writer


def one_problem(store, **fields):
    with open_writer(store) as writer:
        return writer.add_task(make_task(**fields))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_problems_are_refused_and_leave_nothing(open_store, split):
    store = open_store()

    def write_both():
        with open_writer(store) as writer:
            writer.add_task(make_task("fine"))
            writer.add_task(make_task("held-out", split))

    with pytest.raises(MemoryStoreError, match=f"split={split}; memory keeps training problems only"):
        write_both()
    assert store.generation == 0
    assert store.tasks() == []


def test_the_schema_itself_refuses_held_out_problems(open_store):
    store = open_store()
    one_problem(store)
    with pytest.raises(MemoryStoreError, match="CHECK constraint"), open_writer(store) as writer:
        writer.ledger.db.execute("UPDATE tasks SET split = 'test'")


def test_a_task_is_one_problem_and_its_id_names_one_text(open_store):
    store = open_store()
    first = one_problem(store)
    assert one_problem(store) == first
    with pytest.raises(MemoryStoreError, match="task_id=t has another text"):
        one_problem(store, key="something else")


def test_successes_are_distinct_and_the_oldest_leaves(open_store):
    store = open_store(experiences_per_task=2)
    problem = one_problem(store)
    with open_writer(store) as writer:
        ids = [writer.add_experience(problem, make_rollout(text=text), n) for n, text in enumerate("aabc")]
    assert ids[0] == ids[1]
    assert [experience.response for experience in store.experiences()] == ["b", "c"]
    assert store.experiences(None) == store.experiences()  # a retired attempt that nothing rests on is deleted


def test_failures_are_distinct_by_error(open_store):
    store = open_store()
    problem = one_problem(store)
    with open_writer(store) as writer:
        for text, answer in (("x", "1"), ("y", "1"), ("z", "2")):
            writer.add_experience(problem, make_rollout(text=text, correct=False, answer=answer), 0)
        for feedback in ("no brackets", "no brackets", "too long"):
            rollout = make_rollout(text="w", correct=False, feedback=feedback, status="format")
            writer.add_experience(problem, rollout, 0)
    assert [(e.response, e.feedback, e.support) for e in store.experiences()] == [
        ("x", "", 2), ("z", "", 1), ("w", "no brackets", 2), ("w", "too long", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "rollout", [make_rollout(status="sandbox_error", correct=False), make_rollout(text="<think> on and on"),
                make_rollout(text="  ")]
)  # fmt: skip
def test_what_says_nothing_is_not_kept(open_store, rollout):
    store = open_store()
    problem = one_problem(store)
    with open_writer(store) as writer:
        assert writer.add_experience(problem, rollout, 0) is None
    assert store.experiences(None) == []


def test_thinking_is_stripped():
    assert without_thinking("<think>a</think> b") == "b"
    assert without_thinking("a</think>b") == "b"
    assert without_thinking("b <think> c") == "b"


def test_an_insight_written_again_gains_support_and_evidence(open_store):
    store = open_store()
    problem = one_problem(store)
    with open_writer(store) as writer:
        attempts = [writer.add_experience(problem, make_rollout(text=text), 0) for text in "ab"]
        first = writer.add_insight(problem, "strategy", "use  it", policy_version=0, parents=attempts[:1])
        second = writer.add_insight(problem, "strategy", "use it ", policy_version=3, parents=attempts[1:])
        assert writer.add_insight(problem, "contrast", "use it", policy_version=3) != first
    assert first == second
    assert store.insights()[0].support == 2
    assert store.query("SELECT parent_id FROM links WHERE child_id = ? ORDER BY 1", first) == [(i,) for i in attempts]


def test_lessons_do_not_drive_out_a_strategy(open_store):
    store = open_store(insights_per_task=3)
    problem = one_problem(store)
    with open_writer(store) as writer:
        writer.add_insight(problem, "strategy", "do", policy_version=0)
        for n in range(5):
            writer.add_insight(problem, "lesson", f"not {n}", policy_version=0)
    assert [insight.text for insight in store.insights()] == ["do", "not 3", "not 4"]


def test_a_retired_insight_comes_back_and_ids_are_never_reused(open_store):
    store = open_store(insights_per_task=1)
    problem = one_problem(store)
    with open_writer(store) as writer:
        first = writer.add_insight(problem, "lesson", "a", policy_version=0)
        second = writer.add_insight(problem, "lesson", "b", policy_version=0)
        assert writer.add_insight(problem, "lesson", "a", policy_version=0) == first
    assert [insight.id for insight in store.insights()] == [first]
    with open_writer(store) as writer:
        old = [writer.add_experience(problem, make_rollout(text=str(n)), n) for n in range(6)]
    with open_writer(store) as writer:
        assert writer.add_experience(problem, make_rollout(text="new"), 9) == max(old) + 1
    assert second not in [insight.id for insight in store.insights()]


def test_capacity_retires_old_copies_before_anything_else(open_store):
    store = open_store(capacity=3)
    problems = [one_problem(store, task_id=str(n)) for n in range(3)]
    with open_writer(store) as writer:
        writer.add_insight(problems[0], "lesson", "unique and oldest", policy_version=0)
        for problem in problems:
            writer.add_insight(problem, "strategy", "the same", policy_version=0)
    assert [(i.task_row, i.text) for i in store.insights()] == [
        (problems[0], "unique and oldest"), (problems[1], "the same"), (problems[2], "the same"),
    ]  # fmt: skip


def test_insights_must_be_usable(open_store):
    store = open_store()
    problem = one_problem(store)
    for kind, text in (("strategy", "  "), ("behaviour", "x")):
        with pytest.raises(MemoryStoreError, match="kind"), open_writer(store) as writer:
            writer.add_insight(problem, kind, text, policy_version=0)
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
def test_leak_filter(answer, text, leaks):
    words = answer_words(answer)
    assert bool(leak_reason(text, fingerprint(words), len(words), sum(map(len, words)))) == leaks


def test_a_leaking_insight_is_quarantined_for_good(open_store):
    store = open_store()
    problem = one_problem(store, answer="sodium chloride")
    with open_writer(store) as writer:
        writer.add_insight(problem, "strategy", "say sodium chloride", policy_version=0)
        writer.add_insight(problem, "strategy", "say sodium chloride", policy_version=1)
    assert store.insights() == []
    assert [i.leak for i in store.insights("quarantined")] == ["states the answer"]


def test_each_change_is_logged_with_what_it_replaced(open_store):
    store = open_store()
    problem = one_problem(store)
    with open_writer(store) as writer:
        insight = writer.add_insight(problem, "lesson", "a", policy_version=0)
    with open_writer(store) as writer:
        writer.set_status(1, insight, "retired", "harmful")
        writer.set_status(1, insight, "retired", "harmful")  # no change, no entry
    assert store.query("SELECT generation, action, before, after, reason FROM ops") == [
        (2, "add", None, None, "reflection"),
        (3, "change", '{"status": "active"}', '{"status": "retired"}', "harmful"),
    ]
