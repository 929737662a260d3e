"""Memory that is updated with each batch: written before it is read, nothing twice, nothing of a held-out task."""

import json
from dataclasses import replace

import pytest
from memory_world import make_rollout, make_task

from pmd.callbacks.reflection import ReflectionCallback
from pmd.config.schema import MemoryConfig, ReflectionConfig
from pmd.errors import MemoryStoreError
from pmd.memory import EpochRecord, GroupRecord, ProceduralMemory
from pmd.memory.behaviour_writer import Written
from pmd.memory.pending import decode, encode
from pmd.memory.reflect import Reflections, Reflector
from pmd.memory.stream import MemoryUpdater
from pmd.tasks.prompts.base import PromptFormat
from pmd.tasks.prompts.parsing import parse_items, parse_line
from pmd.types import CaseCounts, Completion, Verdict

TASKS = {f"t{n}": make_task(f"t{n}", key=f"apple number{n}") for n in range(6)}


class Plain(PromptFormat):
    """A prompt is the number of its task, or of insights."""

    def reflection(self, task, rollouts, known=()):
        return [[int(task.task_id[1:])]]

    def parse_reflection(self, text):
        return parse_items(text)

    def abstraction(self, insights):
        return [100 + len(insights)]

    def parse_abstraction(self, text):
        return parse_line(text)


class Engine:
    """Writes an insight for each reflection, and a behaviour for each cluster; notes the prompts."""

    policy_version = 0

    def __init__(self, raves=False):
        self.asked, self.raves = [], raves

    def generate(self, requests, sampling, role="student"):
        for position, request in enumerate(requests):
            self.asked.append(request.prompt_ids[0])
            title = "Rule" if request.prompt_ids[0] > 100 else "Apples"
            item = {"kind": "strategy", "title": title, "content": "wash them first"}
            text = "I see." if self.raves else json.dumps(item)
            yield position, Completion((1, 2, 3), (0.0,) * 3, text, "stop", 0)


class Writer:
    """An external writer that notes for how many steps it is asked to write."""

    def __init__(self):
        self.steps = []

    def write(self, clusters, num_steps):
        self.steps.append(num_steps)
        return Written(["wash them"] * len(clusters), 5 * len(clusters), len(clusters))


def updater_in(folder, excluded=frozenset(), tasks=TASKS, engine=None, writer=None, **config):
    settings = MemoryConfig(**{"update": "batch", "scope": "own", "levels": [0, 1, 2]} | config)
    memory = ProceduralMemory(folder / "memory.sqlite", settings, [t.memory_key for t in TASKS.values()], excluded)
    reflector = Reflector(engine or Engine(), Plain(), ReflectionConfig(), tasks, 0, writer)
    return MemoryUpdater(EpochRecord(), memory, reflector)


def group(task_id, step, *correct):
    """A group of attempts, right and wrong, of different words."""
    attempts = [make_rollout(task_id, f"{task_id} step {step} try {n}", correct=c) for n, c in enumerate(correct)]
    return [
        replace(r, rollout_id=f"{task_id}-{step}#{n}", group_id=f"{task_id}-{step}") for n, r in enumerate(attempts)
    ]


def shown(updater, task_id, group_id=""):
    memory = updater.memory
    return {item.text for item in memory.retrieve(TASKS[task_id], seed=0)}, memory.past_success(
        TASKS[task_id], group_id
    )


def test_what_a_batch_teaches_is_read_by_its_own_teachers(tmp_path):
    updater = updater_in(tmp_path)
    assert shown(updater, "t0") == (set(), None)
    metrics = updater.update([group("t0", 0, True, False, False), group("t1", 0, False)], 0, 1, 0)
    assert (metrics["reflect/num_prompts"], metrics["reflect/num_insights"]) == (2, 2)
    items = {item.kind: item for item in updater.memory.retrieve(TASKS["t0"], seed=0)}
    assert items["experience"].text == "t0 step 0 try 0"
    strategy = items["strategy"]
    assert (strategy.text, strategy.num_successes, strategy.num_attempts) == ("Apples: wash them first", 1, 3)
    assert "behaviour" in items
    # The group's own success is not a past one: it would reach the teacher that scores it.
    assert updater.memory.past_success(TASKS["t0"], "t0-0") is None
    assert updater.memory.past_success(TASKS["t0"], "t0-1") == "t0 step 0 try 0"
    updater.update([group("t0", 1, True, True)], 1, 1, 1)
    assert updater.memory.past_success(TASKS["t0"], "t0-1") == "t0 step 0 try 0"
    (strategy,) = (item for item in updater.memory.retrieve(TASKS["t0"], seed=0) if item.kind == "strategy")
    assert (strategy.num_successes, strategy.num_attempts) == (2, 2)  # of the latest reflection that wrote it
    updater.memory.close()


def test_what_was_shown_is_logged_with_the_next_update_and_rollouts_are_written_once(tmp_path):
    updater = updater_in(tmp_path)
    record, store = updater.record, updater.memory.store
    updater.update([group("t0", 0, True)], 0, 1, 0)
    assert record.groups == {}
    items = tuple(updater.memory.retrieve(TASKS["t0"], seed=0))
    record.groups["t0-0"] = GroupRecord(0, TASKS["t0"], [], items, (), 1)
    updater.update([group("t1", 1, True)], 1, 1, 1)
    sql = "SELECT generation, step, group_id, item_id FROM retrievals ORDER BY id"
    assert store.query(sql) == [(1, 0, "t0-0", item.item_id) for item in items]
    assert [(e.task_id, e.support) for e in store.experiences()] == [("t0", 1), ("t1", 1)]
    assert store.generation == 2
    updater.memory.close()


def test_behaviours_are_written_in_every_nth_update(tmp_path):
    updater = updater_in(tmp_path, behaviour_every=2)
    counts = []
    for step in range(5):
        updater.update([group(f"t{step}", step, True)], step, 1, 0)
        (support,) = [b.support for b in updater.memory.store.behaviours()] or [0]
        counts.append(support)
    assert counts == [0, 2, 2, 4, 4]
    updater.memory.close()


def test_every_generated_token_is_counted(tmp_path):
    updater = updater_in(tmp_path, behaviour_every=2)
    counts = [updater.update([group(f"t{step}", step, True)], step, 1, 0) for step in range(3)]
    generated = [(m["reflect/num_tokens"], m["reflect/num_behaviour_tokens"]) for m in counts]
    assert generated == [(3, 0), (3, 3), (3, 0)]
    assert sum(map(sum, generated)) == 3 * len(updater.reflector.engine.asked)
    updater.memory.close()


def test_an_external_writer_has_its_calls_for_all_steps_since_it_last_wrote(tmp_path):
    writer = Writer()
    updater = updater_in(tmp_path, writer=writer, behaviour_every=2)
    metrics = [updater.update([group(f"t{n % 6}", n, True)], n, 3, 0) for n in range(5)]  # three steps to a batch
    assert writer.steps == [6, 6]
    assert [m["memory/behaviour_calls"] for m in metrics] == [0, 1, 0, 0, 0]  # the second time, no cluster is new
    assert [m["memory/behaviour_writer_tokens"] for m in metrics] == [0, 5, 0, 0, 0]
    assert "reflect/num_behaviour_tokens" not in metrics[1]  # the policy wrote none
    updater.memory.close()


def test_a_frozen_memory_is_written_with_the_calls_of_its_whole_pass(tmp_path):
    writer = Writer()
    updater = updater_in(tmp_path, writer=writer, frozen=True)
    updater.update([group(task_id, 0, True) for task_id in TASKS], 0, 8, 0)
    assert writer.steps == [8]
    updater.memory.close()


@pytest.mark.parametrize(("raves", "told"), [(True, '0 of 4 reflections readable, e.g. "I see."'), (False, "")])
def test_an_epoch_of_unreadable_reflections_is_explained_when_it_ends(tmp_path, caplog, raves, told):
    updater = updater_in(tmp_path, engine=Engine(raves))
    trainer = module = None  # the stream has reflected already
    callback = ReflectionCallback(updater.record, updater.memory, updater.reflector)
    for step in range(2):
        updater.update([group(f"t{step}", step, True), group(f"t{step + 2}", step, True)], step, 1, 0)
    callback.on_train_epoch_end(trainer, module)  # within an epoch
    assert caplog.messages == []
    updater.record.is_complete = True
    callback.on_train_epoch_end(trainer, module)
    assert told in "".join(caplog.messages)
    assert len(caplog.messages) == bool(told)
    updater.record.start(1)
    assert updater.record.reflected == Reflections()
    updater.memory.close()


def test_a_transient_memory_holds_one_batch(tmp_path):
    updater = updater_in(tmp_path, transient=True, replay=False, scope="both", cluster_support=2)
    updater.update([group("t0", 0, True), group("t1", 0, True)], 0, 1, 0)
    assert len(updater.memory.store.behaviours()) == 1
    updater.update([group("t2", 1, True)], 1, 1, 1)
    store = updater.memory.store
    assert len(store.behaviours("retired")) == 1
    assert [e.task_id for e in store.experiences()] == [i.task_id for i in store.insights()] == ["t2"]
    assert store.behaviours() == []
    assert shown(updater, "t0") == (set(), None)
    assert shown(updater, "t2")[0] == {"Apples: wash them first"}
    updater.memory.close()


def test_a_frozen_memory_is_closed_after_its_first_update(tmp_path):
    updater = updater_in(tmp_path, frozen=True, behaviour_every=9)
    updater.update([group(task_id, 0, True) for task_id in TASKS], 0, 1, 0)
    assert updater.memory.is_closed
    assert updater.memory.store.behaviours()
    content = list(updater.memory.store.db.iterdump())
    assert updater.update([group("t0", 1, True)], 1, 1, 1) == {}
    assert list(updater.memory.store.db.iterdump()) == content
    updater.memory.close()


def test_no_batch_writes_a_held_out_task(tmp_path):
    tasks = TASKS | {"t9": make_task("t9", "validation")}
    updater = updater_in(tmp_path, excluded=frozenset({"t1"}), tasks=tasks)
    updater.update([group("t0", 0, True), group("t1", 0, True)], 0, 1, 0)
    assert [task.task_id for task in updater.memory.store.tasks()] == ["t0"]
    with pytest.raises(MemoryStoreError, match="memory keeps training tasks only"):
        updater.update([group("t0", 1, True), group("t9", 1, True)], 1, 1, 0)
    assert (updater.memory.generation, len(updater.memory.store.experiences())) == (1, 1)
    updater.memory.close()


def test_a_record_survives_a_checkpoint_exactly(tmp_path):
    updater = updater_in(tmp_path)
    updater.update([group("t0", 0, True, False)], 0, 1, 0)
    items = tuple(updater.memory.retrieve(TASKS["t0"], seed=0))
    assert len(items) > 1
    odd = Verdict(1 / 3, False, "timeout", "caf\u00e9 \ud800 \x00", None, 1e-9, CaseCounts(3, 1, 2, 1), "why")
    rollouts = [replace(r, verdict=odd, completion=replace(r.completion, logprobs=())) for r in group("t1", 0, True)]
    record = EpochRecord(3, False, {"g": GroupRecord(7, TASKS["t1"], rollouts, items[:1], items[1:], 1)}, 5, 4, 99, 2)
    record.reflected = Reflections(num_prompts=3, num_malformed=2, example="caf\u00e9 \ud800")
    record.written = Written([None, "wash"], 12, 2, problem="busy")
    kept = EpochRecord()
    decode(encode(record), kept, TASKS)
    assert kept == record
    updater.memory.close()
