"""Asking the policy what its attempts teach: what is asked once more, what is counted, what is left out."""

import json
from dataclasses import dataclass, field, replace

from pmd.config.schema import ReflectionConfig
from pmd.memory.reflect import RETRY_TEMPERATURE, Reflections, abstract, reflect
from pmd.tasks.prompts.base import WHOLE, Extent, PromptFormat
from pmd.tasks.prompts.parsing import parse_items, parse_line
from pmd.types import Completion, MemoryItem, Message, Rollout, Task, Verdict

TASKS = {f"t{n}": Task(f"t{n}", (Message("user", f"question {n}"),), "exact", "train") for n in range(4)}
GOOD = '{"kind": "lesson", "title": "Units", "content": "Check them."}'


class Plain(PromptFormat):
    """One reflection prompt a group, as long as the number of known insights."""

    def reflection(self, task, rollouts, known=(), extent=WHOLE):
        return [[int(task.task_id[1:])] * (1 + len(known))]

    def parse_reflection(self, text):
        return parse_items(text)

    def abstraction(self, insights):
        return [len(insight) for insight in insights for _ in range(9 if insight == "long" else 1)]

    def parse_abstraction(self, text):
        return parse_line(text)


@dataclass
class Scripted:
    """Answers the n-th call with the n-th list of texts, and remembers what it was asked."""

    script: list[list[str]]
    calls: list = field(default_factory=list)
    policy_version: int = 0

    def generate(self, requests, sampling, role="student"):
        texts = self.script[len(self.calls)]
        self.calls.append((list(requests), sampling, role))
        for position in reversed(range(len(requests))):  # engines finish in any order
            yield position, Completion((1, 2, 3), (0.0,) * 3, texts[position], "stop", 0)

    def sync(self, policy_version): ...
    def sleep(self): ...
    def wake(self): ...
    def close(self): ...


def group(task_id: str) -> list[Rollout]:
    completion = Completion((1,), (0.0,), "attempt", "stop", 0)
    return [Rollout(f"{task_id}-{n}", f"g-{task_id}", task_id, (), completion, Verdict(1.0, True, "ok")) for n in "ab"]


def run(script, known=lambda task_id: (), tasks=("t0", "t1", "t2"), **config):
    engine = Scripted(script)
    found = reflect(engine, TASKS, [group(t) for t in tasks], Plain(), ReflectionConfig(**config), "key", known)
    return engine, found


def test_what_is_malformed_is_asked_once_more_and_warmer():
    engine, found = run([["no", GOOD, "{"], [GOOD.replace("Units", "Late"), "no again"]])
    (first, cold, role), (second, warm, again) = engine.calls
    assert [r.prompt_ids for r in second] == [first[0].prompt_ids, first[2].prompt_ids]
    assert (cold.temperature, warm.temperature) == (0.0, RETRY_TEMPERATURE)
    assert role == again == "teacher"
    assert not {r.seed for r in first} & {r.seed for r in second}  # or a warm policy would write the same again
    assert [(d.task_id, d.text) for d in found.changes] == [("t0", "Late: Check them."), ("t1", "Units: Check them.")]
    assert found.changes[0].rollout_ids == ("t0-a", "t0-b")
    assert (found.num_prompts, found.num_retried, found.num_malformed) == (3, 2, 1)
    assert found.num_tokens == 5 * 3


def test_a_warm_reflection_is_not_cooled_by_asking_again():
    engine, _ = run([["no"], ["no"]], tasks=("t0",), temperature=1.0)
    assert engine.calls[1][1].temperature == 1.0


def test_without_retry_nothing_is_asked_again():
    engine, found = run([["no", GOOD, "no"]], retry=False)
    assert len(engine.calls) == 1
    assert (len(found.changes), found.num_retried, found.num_malformed) == (1, 0, 2)


def test_good_items_stay_and_the_others_are_counted():
    spoilt = GOOD.replace("lesson", "spell")
    _, found = run([[f"{spoilt} {GOOD} {spoilt}", " ".join([GOOD] * 5), GOOD + ' {"kind":']])
    assert [d.task_id for d in found.changes] == ["t0", "t1", "t1", "t1", "t2"]
    assert (found.num_malformed, found.num_rejected) == (0, 2 + 2 + 1)


def test_a_change_to_an_insight_that_was_not_listed_is_counted():
    def known(task_id):
        return (MemoryItem(40, 1, "strategy", "old", 1, task_id), MemoryItem(41, 1, "lesson", "older", 1, task_id))

    edit = {"action": "edit", "insight": 2, "title": "New", "content": "text"}
    retire = [{"action": "retire", "insight": number} for number in (1, 0, 3)]
    _, found = run([[json.dumps([edit, *retire[:1]]), json.dumps(retire[1:]), GOOD]], known)
    assert [(d.action, d.target_id, d.kind) for d in found.changes] == [
        ("edit", 41, "lesson"), ("retire", 40, "strategy"), ("add", None, "lesson"),
    ]  # fmt: skip
    assert found.num_unknown == 2


def test_a_prompt_too_long_shows_fewer_attempts_before_it_shows_shorter_ones():
    class Sized(Plain):
        """As long as its attempts together, in units of a thousand characters."""

        def reflection(self, task, rollouts, known=(), extent=WHOLE):
            asked.append(extent)
            size = min(extent.characters or 10_000, 10_000) * extent.attempts
            return [[0] * (size // 1000)]

    for limit, expected in ((40, WHOLE), (39, Extent(3)), (10, Extent(1)), (9, Extent(1, 8192)), (1, Extent(1, 1024))):
        asked: list[Extent] = []
        engine = Scripted([[GOOD]])
        found = reflect(engine, TASKS, [group("t0")], Sized(), ReflectionConfig(max_prompt_tokens=limit), "key")
        assert asked[-1] == expected
        assert (found.num_prompts, found.num_shortened, found.num_overlong) == (1, int(expected != WHOLE), 0)
        assert len(engine.calls[0][0][0].prompt_ids) <= limit


def test_groups_with_nothing_to_say_are_counted():
    class Silent(Plain):
        def reflection(self, task, rollouts, known=(), extent=WHOLE):
            return [] if task.task_id == "t1" else [[1]]

    found = reflect(Scripted([[GOOD]]), TASKS, [group("t0"), group("t1")], Silent(), ReflectionConfig(), "key")
    assert (found.num_groups, found.num_prompts, found.num_silent) == (2, 1, 1)


def test_a_dead_memory_is_explained():
    def explained(texts, finish="stop", **config):
        class Ending(Scripted):
            def generate(self, requests, sampling, role="student"):
                for position, completion in super().generate(requests, sampling, role):
                    yield position, replace(completion, finish_reason=finish)

        settings = ReflectionConfig(retry=False, **config)
        found = reflect(Ending([texts]), TASKS, [group(t) for t in ("t0", "t1", "t2")], Plain(), settings, "key")
        return found.describe_failure(settings)

    assert explained(["no", GOOD, "no"]) == ""
    dead = explained(["I\x1b[31m think", "no", "no"])
    assert dead.startswith(
        'memory: 0 of 3 reflections readable, e.g. "I [31m think". Likely cause: the policy does not'
    )
    assert "raise reflection.max_new_tokens=99" in explained(["{", "{", "{"], "length", max_new_tokens=99)
    assert "writes nothing" in explained(["", " ", ""])
    assert "exceed reflection.max_prompt_tokens" in Reflections(num_groups=2, num_overlong=2).describe_failure(
        ReflectionConfig()
    )
    assert "2 had no success and no feedback" in Reflections(num_groups=2, num_silent=2).describe_failure(
        ReflectionConfig()
    )
    assert Reflections().describe_failure(ReflectionConfig()) == ""


def test_prompts_too_long_are_not_asked_and_counted():
    def known(task_id):
        return [MemoryItem(n, 1, "lesson", "x", 1, task_id) for n in range(9 if task_id == "t1" else 0)]

    engine, found = run([[GOOD, GOOD]], known, max_prompt_tokens=5)
    assert [r.prompt_ids for r in engine.calls[0][0]] == [(0,), (2,)]
    assert (found.num_prompts, found.num_overlong, len(found.changes)) == (2, 1, 2)


def test_a_sample_of_the_groups_is_drawn_by_the_key():
    def asked(key):
        engine = Scripted([[GOOD, GOOD]])
        groups = [group(task_id) for task_id in TASKS]
        reflect(engine, TASKS, groups, Plain(), ReflectionConfig(max_groups=2), key)
        return [r.prompt_ids for r in engine.calls[0][0]]

    assert asked("0/reflect/0") == asked("0/reflect/0")
    assert len({tuple(sorted(asked(f"0/reflect/{epoch}"))) for epoch in range(20)}) > 1


def test_abstractions_keep_their_place_whatever_fails():
    clusters = [["a"], [], ["bb"], ["ccc"], ["long"]]  # the second asks nothing, the last is too long
    engine = Scripted([["no", GOOD, "{"], ["still no", GOOD.replace("Units", "Late")]])
    found = abstract(engine, clusters, Plain(), ReflectionConfig(max_prompt_tokens=5), "key")
    assert [[r.prompt_ids for r in requests] for requests, _, _ in engine.calls] == [[(1,), (2,), (3,)], [(1,), (3,)]]
    assert found.texts == [None, None, "Units: Check them.", "Late: Check them.", None]
    assert found.num_tokens == 5 * 3  # three were asked about, two again
    once = Scripted([["no", GOOD, "{"]])
    config = ReflectionConfig(max_prompt_tokens=5, retry=False)
    found = abstract(once, clusters, Plain(), config, "key")
    assert (found.texts, found.num_tokens) == ([None, None, "Units: Check them.", None, None], 3 * 3)


def test_a_cluster_too_large_for_a_prompt_is_put_into_words_from_its_best_supported_insights():
    engine = Scripted([[GOOD, GOOD]])
    clusters = [["a" * n for n in range(1, 41)], ["b"]]
    found = abstract(engine, clusters, Plain(), ReflectionConfig(max_prompt_tokens=12), "key")
    assert found.texts == ["Units: Check them."] * 2
    assert [request.prompt_ids for request in engine.calls[0][0]] == [tuple(range(1, 11)), (1,)]
