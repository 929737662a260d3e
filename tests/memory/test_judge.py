"""What audits find decides what stays: harmful items leave, leaks are quarantined, known ones are internalized."""

from dataclasses import replace

import pytest
from memory_world import make_rollout

from pmd.config.schema import TinyWorldConfig
from pmd.memory.embed import HashEmbedder
from pmd.memory.index import TaskIndex
from pmd.memory.judge import ItemAudit
from pmd.memory.retrieve import Retriever
from pmd.memory.tools.history import diff, rollback
from pmd.memory.update import open_writer
from pmd.tasks.prompts.words import parse_statement
from pmd.tasks.tiny import load_tiny
from pmd.tiny.world import make_world, solution
from pmd.types import InsightChange, Message, Task


def lifts(item_id: int, correct: float | None, wrong: float | None, **fields) -> ItemAudit:
    count = 0 if correct is None else 1
    audit = ItemAudit(0, "g", 1, item_id, count, 1, correct, wrong, correct, wrong, None)
    return replace(audit, **fields)


def one_insight(store, text: str = "try the left door", kind: str = "strategy") -> int:
    task = Task("t", (Message("user", "which door"),), "exact", "train", answer="forty two", memory_key="door")
    with open_writer(store) as writer:
        return writer.add_insight(writer.add_task(task), kind, text, policy_version=0)


def audit_in(store, *audits: ItemAudit) -> dict[str, int]:
    with open_writer(store) as writer:
        return writer.audit(audits)


def status(store, item_id: int) -> str:
    return next(item.status for item in store.insights(None) if item.id == item_id)


@pytest.mark.parametrize(
    ("audits", "wanted"),
    [
        ([(-0.5, 0.1), (-0.4, 0.0), (-0.6, 0.1)], "retired"),  # lowers correct attempts
        ([(0.1, 0.6), (0.1, 0.5), (0.2, 0.7)], "retired"),  # raises wrong ones more
        ([(-0.5, 0.1), (-0.4, 0.0)], "active"),  # too little evidence
        ([(-0.5, 0.1), (0.9, 0.0), (-0.4, 0.2)], "active"),  # not sure
        ([(-0.001, 0.0), (-0.002, 0.0), (-0.001, 0.0)], "active"),  # within the margin
        ([(0.5, 0.0), (0.4, -0.1), (0.6, 0.0)], "active"),  # useful
        ([(None, 0.5), (None, 0.5), (None, 0.5)], "active"),  # wrong attempts alone decide nothing
    ],
)
def test_what_follows_from_lift(open_store, audits, wanted):
    store = open_store()
    item = one_insight(store)
    audit_in(store, *(lifts(item, *pair) for pair in audits))
    assert status(store, item) == wanted


def test_evidence_accumulates_over_epochs_and_counts_once_for_equal_texts(open_store):
    store = open_store()
    first = one_insight(store)
    other = Task("u", (Message("user", "which gate"),), "exact", "train", memory_key="gate")
    with open_writer(store) as writer:
        second = writer.add_insight(writer.add_task(other), "strategy", "try the left door", policy_version=0)
    for _ in range(2):
        audit_in(store, lifts(first, -0.5, 0.0))
    assert status(store, first) == "active"
    assert audit_in(store, lifts(second, -0.5, 0.0)) == {"retired": 2}


def test_a_harmful_item_does_not_come_back_and_rollback_undoes_it(open_store):
    store = open_store()
    item = one_insight(store)
    before = store.generation
    audit_in(store, *[lifts(item, -0.5, 0.1)] * 3)
    one_insight(store)  # written again
    assert status(store, item) == "retired"
    assert "retired" in {difference.change for difference in diff(store, before, store.generation)}
    rollback(store, before)
    assert status(store, item) == "active"


def test_what_only_helps_with_the_answer_is_quarantined(open_store):
    store = open_store()
    item = one_insight(store)
    leaking = lifts(item, 0.8, 0.0, masked_lift_correct=0.0, masked_lift_wrong=0.0)
    assert audit_in(store, leaking, leaking, leaking) == {"quarantined": 1}


def test_internalized_when_the_student_gains_nothing_and_back_when_it_does(open_store):
    store = open_store()
    item = one_insight(store)
    audit_in(store, *[lifts(item, 0.5, 0.0)] * 3)
    assert status(store, item) == "active"
    audit_in(store, *[lifts(item, 0.5, None, student_lift=0.001)] * 3)
    assert status(store, item) == "internalized"
    retriever = Retriever(store, TaskIndex.open(store), store.config)
    assert [p.item_id for p in retriever.retrieve("door", seed=0)] == [item]  # the teacher still needs it
    audit_in(store, *[lifts(item, 0.5, None, student_lift=0.3 + n / 100) for n in range(3)])
    assert status(store, item) == "active"


def test_a_leaked_answer_is_quarantined(open_store):
    store = open_store()
    task = load_tiny(TinyWorldConfig(families=1), 0)["train"][0]
    name, rule = next(iter(make_world(4, 1, 0).items()))
    problem = parse_statement(task.question)
    with open_writer(store) as writer:
        task_row = writer.add_task(task)
        leak = writer.add_insight(
            task_row, "strategy", f"solved use {name} {solution(rule, problem)}", policy_version=0
        )
        honest = writer.add_insight(task_row, "strategy", f"strategy use {name} {rule}", policy_version=0)
    assert (status(store, leak), status(store, honest)) == ("quarantined", "active")


def test_changes_reach_only_insights_of_their_own_task(open_store):
    store = open_store()
    mine = one_insight(store)
    other = Task("u", (Message("user", "which gate"),), "exact", "train", memory_key="gate")
    with open_writer(store) as writer:
        gate = writer.add_task(other)
        theirs = writer.add_insight(gate, "lesson", "never push", policy_version=0)
        edit = InsightChange("t", "strategy", "try the left door, then the right", (), "edit", mine)
        assert writer.apply_change(1, edit, 4, ())
        assert not writer.apply_change(1, replace(edit, target_id=theirs), 4, ())
        assert not writer.apply_change(1, replace(edit, action="retire", target_id=999), 4, ())
        assert not writer.apply_change(1, replace(edit, action="retire", target_id=None), 4, ())
        assert writer.apply_change(gate, replace(edit, action="retire", target_id=theirs), 4, ())
    rows = store.query("SELECT version, previous_id, content FROM insights WHERE task_row = 1 AND status = 'active'")
    assert rows == [(2, mine, "try the left door, then the right")]
    assert (status(store, mine), status(store, theirs)) == ("retired", "retired")


def test_a_reflection_cannot_retire_what_audits_found_useful(open_store):
    store = open_store()
    useful, unknown = one_insight(store), one_insight(store, "try the window")
    audit_in(store, *(lifts(useful, 0.5, 0.0) for _ in range(3)))
    with open_writer(store) as writer:
        retire = InsightChange("t", "strategy", "", (), "retire", useful)
        assert not writer.apply_change(1, retire, 1, ())
        assert writer.apply_change(1, replace(retire, target_id=unknown), 1, ())
    assert (status(store, useful), status(store, unknown)) == ("active", "retired")


def test_near_duplicates_become_one_with_all_evidence(open_store):
    store = open_store()
    one = one_insight(store, "check the units of every term before adding")
    two = one_insight(store, "check the units of every term before adding them")
    lesson = one_insight(store, "check the units of every term before adding", kind="lesson")
    with open_writer(store) as writer:
        assert writer.merge([1]) == 1
    rows = store.query("SELECT id, status, support FROM insights ORDER BY id")
    assert rows == [(one, "active", 2), (two, "retired", 0), (lesson, "active", 1)]


def test_the_better_supported_of_two_stays_and_equal_vectors_meet_the_highest_threshold(open_store):
    store = open_store(merge_similarity=1.0)
    other = one_insight(store, "an unrelated rule stands here first")
    first = one_insight(store, "check the units and then add")
    second = one_insight(store, "then add and check the units")  # the same words: similarity 1
    with open_writer(store) as writer:
        parents = [writer.add_experience(1, make_rollout(text=text), 0) for text in ("tried", "tried again")]
        for text, parent in zip(("check the units and then add", "then add and check the units"), parents, strict=True):
            writer.add_insight(1, "strategy", text, policy_version=0, parents=[parent])
        writer.add_insight(1, "strategy", "then add and check the units", policy_version=0)
        assert writer.merge([1]) == 1
    rows = store.query("SELECT id, status, support FROM insights ORDER BY id")
    assert rows == [(other, "active", 1), (first, "retired", 0), (second, "active", 5)]
    children = "SELECT parent_id FROM links WHERE child_level = 1 AND child_id = ? ORDER BY parent_id"
    assert store.query(children, second) == [(parent,) for parent in parents]


class StoredVectors(HashEmbedder):
    """Merging compares the vectors in the store, as with an embedder that takes long."""

    costly = True


def test_insights_just_written_are_merged_by_stored_vectors(open_store):
    store = open_store(embedder=StoredVectors(64))
    one = one_insight(store, "check the units and then add")
    with open_writer(store) as writer:
        two = writer.add_insight(1, "strategy", "then add and check the units", policy_version=0)
        assert writer.merge([1]) == 1
    assert (status(store, one), status(store, two)) == ("active", "retired")
