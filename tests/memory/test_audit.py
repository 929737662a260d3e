"""What audits find decides what stays: harmful items leave, leaks are quarantined, known ones are internalized."""

from dataclasses import replace

import pytest
from memory_world import make_rollout

from pmd.config.schema import MemoryConfig, ModelConfig, TeacherConfig, TinyWorldConfig
from pmd.memory.audit import ShownGroup, answer_span, audit, choose_groups
from pmd.memory.index import TaskIndex
from pmd.memory.judge import ItemAudit
from pmd.memory.retrieve import Retriever
from pmd.memory.tools.history import diff, rollback
from pmd.memory.update import open_writer
from pmd.policy import make_policy
from pmd.pretrained import load_base, load_tokenizer
from pmd.scoring import PolicyScorer
from pmd.tasks.prompts.words import WordPrompts, parse_statement
from pmd.tasks.tiny import load_tiny
from pmd.tiny.world import make_world, rules_of, solution
from pmd.types import Completion, InsightChange, MemoryItem, Message, Rollout, Task, Verdict


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


def test_absorbed_when_the_student_gains_nothing_and_back_when_it_does(open_store):
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


def test_usefulness_moves_the_rank(open_store):
    store = open_store(max_strategies=1)
    first, second = one_insight(store, "try the left door"), one_insight(store, "look for a key first")
    retriever = Retriever(store, TaskIndex.open(store), store.config)
    assert [p.item_id for p in retriever.retrieve("door", seed=0)] == [first]
    audit_in(store, lifts(second, 0.2, 0.0))
    retriever.refresh()
    assert [p.item_id for p in retriever.retrieve("door", seed=0)] == [second]


def test_groups_are_chosen_mixed_first_and_hopeless_last():
    task = Task("t", (Message("user", "q"),), "exact", "train")
    item = MemoryItem(1, 1, "strategy", "x", 1, "t")

    def group(name: str, *correct: bool) -> ShownGroup:
        rollouts = [make_rollout(f"t{n}", f"{name}{n}", correct=c) for n, c in enumerate(correct)]
        return ShownGroup(0, task, tuple(replace(r, group_id=name) for r in rollouts), (item,))

    groups = [group("a", False, False), group("b", True, False), group("c", True, True), group("d", True, False)]
    groups.append(replace(group("e", True, True), items=()))
    chosen = [g.group_id for g in choose_groups(groups, MemoryConfig(audit_groups=3), "k")]
    assert set(chosen[:2]) == {"b", "d"}
    assert chosen[2] == "c"
    assert chosen == [g.group_id for g in choose_groups(groups[::-1], MemoryConfig(audit_groups=3), "k")]


@pytest.fixture(scope="module")
def tiny():
    config = ModelConfig()
    tokenizer = load_tokenizer(config)
    policy = make_policy(load_base(config), config, TeacherConfig())
    return PolicyScorer(policy, int(tokenizer.pad_token_id), 4096), WordPrompts(tokenizer), tokenizer


def test_the_tiny_teacher_tells_true_from_false(tiny):
    scorer, prompts, tokenizer = tiny
    rules = make_world(4, 8, 0)
    tasks = load_tiny(TinyWorldConfig(families=8, train_per_family=1), 0)["train"]
    groups, true_ids = [], set()
    for number, (task, (name, rule)) in enumerate(zip(tasks, rules.items(), strict=True)):
        problem = parse_statement(task.question)
        wrong = [other for other in rules_of(4) if other != rule]
        rollouts = tuple(
            attempt(task, tokenizer, f"{solution(stated, problem)} <eos>", stated == rule)
            for stated in (rule, wrong[0])
        )
        lines = [f"strategy use {name} {rule}", f"lesson not {name} {wrong[0]}", f"pattern use {name} {rule}"]
        lines += [f"strategy use {name} {wrong[1]}", f"lesson not {name} {rule}"]
        true_ids |= {number * 10 + n for n in range(3)}
        items = tuple(MemoryItem(number * 10 + n, 1, "strategy", text, 1, "t") for n, text in enumerate(lines))
        groups.append(ShownGroup(0, task, rollouts, items))
    found = audit(groups, scorer, prompts, tokenizer, 512)
    assert len(found.audits) == 40
    lowest = min(a.lift_correct for a in found.audits if a.item_id in true_ids)
    highest = max(a.lift_correct for a in found.audits if a.item_id not in true_ids)
    assert lowest > 0 > highest
    masked = [a.masked_usefulness for a in found.audits if a.item_id % 10 == 0]
    assert min(masked) > 0.1  # the rule stands outside the answer span


def attempt(task: Task, tokenizer, text: str, correct: bool) -> Rollout:
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    digits = " ".join(word for word in text.split() if word.isdigit())
    verdict = Verdict(float(correct), correct, "ok" if correct else "wrong_answer", answer=digits)
    completion = Completion(ids, (0.0,) * len(ids), text, "stop", 0)
    return Rollout(f"{task.task_id}#{text}", task.task_id, task.task_id, (), completion, verdict)


def test_answer_span(tiny):
    _, _, tokenizer = tiny
    task = Task("t", (Message("user", "q"),), "exact", "train")
    rollout = attempt(task, tokenizer, "red>gold ; red 3 gold 7 <eos>", True)
    assert answer_span(rollout, tokenizer) == (3, 6)
    assert answer_span(replace(rollout, verdict=replace(rollout.verdict, answer="9 9")), tokenizer) is None


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


def test_near_duplicates_become_one_with_all_evidence(open_store):
    store = open_store()
    one = one_insight(store, "check the units of every term before adding")
    two = one_insight(store, "check the units of every term before adding them")
    lesson = one_insight(store, "check the units of every term before adding", kind="lesson")
    with open_writer(store) as writer:
        assert writer.merge([1]) == 1
    rows = store.query("SELECT id, status, support FROM insights ORDER BY id")
    assert rows == [(one, "active", 2), (two, "retired", 0), (lesson, "active", 1)]
