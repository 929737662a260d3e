"""What one item does to the teacher, measured against a placebo."""

from dataclasses import replace

import pytest
from memory_world import make_rollout

from pmd.config.schema import MemoryConfig, ModelConfig, TeacherConfig, TinyWorldConfig
from pmd.memory.audit import ShownGroup, answer_span, audit, choose_groups
from pmd.policy import make_policy
from pmd.pretrained import load_base, load_tokenizer
from pmd.scoring import PolicyScorer
from pmd.tasks.prompts.words import WordPrompts, parse_statement
from pmd.tasks.tiny import load_tiny
from pmd.tiny.world import make_world, rules_of, solution
from pmd.types import Completion, MemoryItem, Message, Rollout, Task, Verdict


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
