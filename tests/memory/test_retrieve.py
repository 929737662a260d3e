"""What a query finds: neighbours, quotas, levels, scopes, ranks, order."""

import numpy as np
import pytest
from memory_world import make_rollout, make_task

from pmd.config.schema import MemoryConfig
from pmd.errors import AlignmentError
from pmd.memory.behaviours import BehaviourChange
from pmd.memory.embed import HashEmbedder
from pmd.memory.index import TaskIndex
from pmd.memory.judge import ItemAudit
from pmd.memory.retrieve import Retriever
from pmd.memory.store import MemoryStore
from pmd.memory.update import open_writer


def retriever_of(store: MemoryStore, **config) -> Retriever:
    return Retriever(store, TaskIndex.open(store), MemoryConfig(**config))


@pytest.fixture
def small(open_store):
    """Three tasks about apples and one about pears, by nearness to "apple red": 1, 2, 3; 4 is far."""
    keys = ["apple red", "apple green", "apple blue", "pear brown"]
    store = open_store(embedder=HashEmbedder.fit([*keys, *"bcdfghjklmnp"], dimension=64))
    with open_writer(store) as writer:
        for n, key in enumerate(keys, start=1):
            assert writer.add_task(make_task(f"t{n}", key=key)) == n
        for n in (1, 2, 3, 4):
            writer.add_experience(n, make_rollout(f"t{n}", text=f"solved {n}"), 0)
            writer.add_experience(n, make_rollout(f"t{n}", text="oops", correct=False), 0)
        for n in (2, 3):
            writer.add_insight(n, "strategy", "apples: peel", policy_version=0)
        writer.add_insight(1, "strategy", "apples: wash", policy_version=0)
        writer.add_insight(1, "contrast", "peel, not cut", policy_version=0)
        for n in (1, 2, 3):
            for lesson in "abc":
                writer.add_insight(n, "lesson", f"not {lesson}{n}", policy_version=0)
        writer.add_insight(4, "strategy", "pears: wait", policy_version=0)
        writer.replace_behaviours([cluster.change("fruit: peel") for cluster in writer.clusters()], policy_version=0)
    return store


def texts(found):
    return sorted(item.text for item in found)


def test_quotas_are_filled_in_order_and_lessons_take_the_rest(small):
    found = retriever_of(small, k=6).retrieve("apple red", seed=0)
    kinds = sorted(item.kind for item in found)
    assert kinds == ["behaviour", "contrast", "lesson", "lesson", "lesson", "strategy"]
    assert {item.task_id for item in found if item.kind == "lesson"} == {"t1"}  # the nearest task's
    assert len(retriever_of(small, k=6, max_lessons=1).retrieve("apple red", seed=0)) == 4
    assert [p.kind for p in retriever_of(small, k=1).retrieve("apple red", seed=0)] == ["behaviour"]
    assert len(retriever_of(small, k=50, max_strategies=9).retrieve("apple red", seed=0)) == 1 + 3 + 9


class Asymmetric(HashEmbedder):
    """Embeds queries unlike documents: `own` is .8 near its own task, .5 to another and .3 to a third."""

    def embed(self, texts):
        return np.eye(4, dtype=np.float32)[[["own", "near", "far"].index(text) for text in texts]]

    def embed_queries(self, texts):
        assert texts == ["own"]
        return np.array([[0.8, 0.5, 0.3, np.sqrt(1 - 0.64 - 0.25 - 0.09)]], dtype=np.float32)


def test_the_floor_follows_other_tasks_where_a_query_is_unlike_its_own_task(open_store):
    store = open_store(embedder=Asymmetric(4))
    with open_writer(store) as writer:
        for key in ("own", "near", "far"):
            writer.add_insight(writer.add_task(make_task(key, key=key)), "strategy", f"on {key}", policy_version=0)
        writer.embed_new()
    retriever = retriever_of(store, k=4, levels=[1], max_strategies=4)
    assert texts(retriever.retrieve("own", seed=0, task_id="own")) == ["on far", "on near", "on own"]
    assert texts(retriever.retrieve("own", seed=0)) == ["on near", "on own"]  # .3 is below half of .8


def test_a_text_of_several_near_tasks_comes_first(small):
    found = retriever_of(small, k=1, levels=[1], max_strategies=1).retrieve("apple purple", seed=0)
    assert texts(found) == ["apples: peel"]
    assert found[0].task_id == "t2"


def test_each_level_works_alone(small):
    assert texts(retriever_of(small, levels=[2]).retrieve("apple red", seed=0)) == ["fruit: peel"]
    assert {p.level for p in retriever_of(small, levels=[1]).retrieve("apple red", seed=0)} == {1}
    only_attempts = retriever_of(small, levels=[0])
    assert texts(only_attempts.retrieve("apple red", seed=0)) == ["solved 1", "solved 2", "solved 3"]
    assert texts(only_attempts.retrieve("apple red", seed=0, task_id="t1")) == ["solved 2", "solved 3"]
    mixed = retriever_of(small, levels=[0, 1, 2]).retrieve("apple red", seed=0, task_id="t1")
    assert [p.text for p in mixed if p.level == 0] == ["solved 2"]


def test_scope_own_reads_the_task_itself_and_the_nearest_behaviours(small):
    with open_writer(small) as writer:
        changes = [
            BehaviourChange((1,), f"sha{n}", text, None) for n, text in enumerate(("pear brown", "apple", "fig"))
        ]
        writer.replace_behaviours(changes, policy_version=0)
    retriever = retriever_of(small, scope="own", levels=[0, 1, 2], k=9, max_behaviours=2, max_strategies=9)
    found = retriever.retrieve("pear brown", seed=0, task_id="t1")  # the words of t4, the items of t1
    assert {item.task_id for item in found if item.level < 2} == {"t1"}
    assert texts(item for item in found if item.level == 0) == ["solved 1"]
    assert {item.text for item in found if item.level == 1} == {
        "apples: wash", "peel, not cut", "not a1", "not b1", "not c1",
    }  # fmt: skip
    assert "pear brown" in {item.text for item in found if item.level == 2}
    assert sum(item.level == 2 for item in found) == 2
    held_out = retriever.retrieve("apple red", seed=0, task_id="of another split")
    assert {item.level for item in held_out} == {2}
    assert "apple" in texts(held_out)


def test_no_items_with_k_0(small):
    assert retriever_of(small, k=0, levels=[0, 1, 2]).retrieve("apple red", seed=0) == []


def test_kinds(small):
    assert {p.kind for p in retriever_of(small, kinds=["lesson"], k=9).retrieve("apple red", seed=0)} == {"lesson"}


def test_far_tasks_are_not_neighbours(small):
    assert retriever_of(small).retrieve("melon", seed=0) == []
    assert "pears: wait" not in texts(retriever_of(small, k=50).retrieve("apple red", seed=0))


def test_past_success_is_of_the_task_itself_and_the_best(small):
    with open_writer(small) as writer:
        writer.add_experience(1, make_rollout("t1", text="<think>hm</think>newer"), 5)
        writer.add_experience(1, make_rollout("t1", text="poorer", reward=0.5), 9)
    retriever = retriever_of(small)
    assert retriever.past_success("t1") == "newer"
    assert retriever.past_success("t2") == "solved 2"
    assert retriever.past_success("unknown") is None


def test_reading_a_store_that_moved_is_an_error(small):
    retriever = retriever_of(small)
    with open_writer(small):
        pass
    for read in (lambda: retriever.retrieve("apple red", seed=0), lambda: retriever.past_success("t1")):
        with pytest.raises(AlignmentError, match="read-only between updates"):
            read()
    retriever.refresh()
    assert retriever.retrieve("apple red", seed=0)


def test_order_is_drawn_from_the_seed(small):
    retriever = retriever_of(small, k=6)
    orders = [retriever.retrieve("apple red", seed=seed) for seed in range(8)]
    assert len({tuple(p.item_id for p in order) for order in orders}) > 1
    assert len({frozenset(texts(order)) for order in orders}) == 1
    assert [retriever.retrieve("apple red", seed=seed) for seed in range(8)] == orders


def test_an_empty_memory_gives_nothing(open_store):
    retriever = retriever_of(open_store())
    assert retriever.retrieve("anything", seed=0) == []
    assert retriever.past_success("t") is None


def test_families_are_bound_exactly(world, grown):
    """Every item retrieved for new tasks of each family is of that family."""
    retriever = retriever_of(grown, k=8)
    found = [retriever.retrieve(world.key(name), seed=n) for n, name in enumerate(world.names * 20)]
    families = [
        (name, item.text.split()[1]) for name, items in zip(world.names * 20, found, strict=True) for item in items
    ]
    assert len(families) > 3_000
    assert all(wanted == got for wanted, got in families)
    for name, items in zip(world.names, found, strict=False):
        for item in items:
            if item.kind in ("behaviour", "strategy"):
                assert item.text == f"use {name} {world.rule[name]}"


def test_unweighted_words_would_not_bind(world, grown):
    """The weights are what binds: with all words alike, most neighbours are of other families."""
    flat = HashEmbedder(512)
    keys = [task.memory_key for task in world.tasks]
    near = flat.embed([world.key(name) for name in world.names]) @ flat.embed(keys).T
    own = [keys[row].split()[-1] == name for name, row in zip(world.names, near.argmax(1), strict=True)]
    assert sum(own) < 0.9 * len(own)


def test_equal_stores_retrieve_identically(world, grown, tmp_path):
    MemoryStore.restore(tmp_path / "copy.sqlite", grown.snapshot())
    with MemoryStore.open(tmp_path / "copy.sqlite", embedder=world.embedder()) as copy:
        one, other = retriever_of(copy), retriever_of(grown)
        for key in map(world.key, world.names):
            assert one.retrieve(key, seed=3) == other.retrieve(key, seed=3)


@pytest.fixture
def apples(open_store):
    """One strategy and one lesson for each of three tasks about apples."""
    store = open_store()
    with open_writer(store) as writer:
        for n, key in enumerate(["apple red", "apple green", "apple blue"], start=1):
            task_row = writer.add_task(make_task(f"t{n}", key=key))
            writer.add_insight(task_row, "strategy", f"strategy of {n}", policy_version=0)
            writer.add_insight(task_row, "lesson", f"lesson of {n}", policy_version=0)
    return store


@pytest.mark.parametrize(
    ("scope", "task_id", "wanted"),
    [
        ("both", "t1", {"t1", "t2", "t3"}),
        ("own", "t1", {"t1"}),
        ("neighbours", "t1", {"t2", "t3"}),
        ("own", "new", set()),  # a task that memory does not know has nothing of its own
        ("neighbours", "new", {"t1", "t2", "t3"}),
        ("own", None, set()),
    ],
)
def test_scopes(apples, scope, task_id, wanted):
    retriever = retriever_of(apples, k=9, scope=scope, max_strategies=9, levels=[1])
    found = retriever.retrieve("apple red", seed=0, task_id=task_id)
    assert {item.task_id for item in found} == wanted
    assert len(found) == 2 * len(wanted)


def ranked(store: MemoryStore, **config) -> list[str]:
    """Return the strategies retrieved for "apple red" by their scores."""
    settings = {"k": 9, "max_strategies": 9, "levels": [1], "kinds": ["strategy"]} | config
    found = retriever_of(store, **settings).retrieve("apple red", seed=0)
    return [item.text for item in sorted(found, key=lambda item: (-item.score, item.item_id))]


def test_nearer_tasks_score_higher_and_the_best_fill_the_quota(apples):
    assert ranked(apples)[0] == "strategy of 1"
    assert ranked(apples, max_strategies=2) == ranked(apples)[:2]


def test_usefulness_moves_the_score_by_at_most_its_weight(apples):
    plain = {item.text: item.score for item in retriever_of(apples, levels=[1]).retrieve("apple red", seed=0)}
    with open_writer(apples) as writer:
        for item, lift in ((1, -5.0), (5, 5.0)):  # the strategies of tasks 1 and 3
            writer.audit([ItemAudit(0, "g", 1, item, 1, 1, lift, 0.0, None, None, None)])
    for weight in (0.0, 0.5):
        retriever = retriever_of(apples, k=9, max_strategies=9, levels=[1], usefulness_weight=weight)
        scores = {item.text: item.score for item in retriever.retrieve("apple red", seed=0)}
        assert scores["strategy of 1"] == pytest.approx(plain["strategy of 1"] * (1 - weight), rel=0.01)
        assert scores["strategy of 3"] == pytest.approx(scores["lesson of 3"] * (1 + weight), rel=0.01)
    assert ranked(apples, usefulness_weight=0.0) == [f"strategy of {n}" for n in (1, 2, 3)]
    assert ranked(apples, usefulness_weight=1.0)[-1] == "strategy of 1"


def test_a_text_that_a_behaviour_gave_is_not_shown_again(open_store):
    store = open_store(cluster_support=2)
    with open_writer(store) as writer:
        for n in (1, 2):
            task_row = writer.add_task(make_task(f"t{n}", key="apple red"))
            writer.add_insight(task_row, "strategy", "peel first", policy_version=0)
            writer.add_insight(task_row, "strategy", f"cut {n}", policy_version=0)
        changes = [cluster.change(cluster.insights[0].text) for cluster in writer.clusters()]
        writer.replace_behaviours(changes, policy_version=0)
    found = retriever_of(store, k=4, max_strategies=3).retrieve("apple red", seed=0)
    assert texts(found) == ["cut 1", "cut 2", "peel first"]
    assert next(item.kind for item in found if item.text == "peel first") == "behaviour"
