"""Neighbours, quotas, levels, order, determinism; clusters and the ids of behaviours."""

from dataclasses import replace

import pytest
from memory_world import make_rollout, make_task

from pmd.config.schema import MemoryConfig
from pmd.errors import AlignmentError
from pmd.memory.behaviours import find_clusters
from pmd.memory.embed import HashEmbedder
from pmd.memory.index import TaskIndex
from pmd.memory.retrieve import Query, Retriever
from pmd.memory.store import MemoryStore
from pmd.memory.update import open_writer


def retriever_of(store: MemoryStore, **config) -> Retriever:
    return Retriever(store, TaskIndex.open(store), MemoryConfig(**config))


@pytest.fixture
def small(open_store):
    """Three problems about apples and one about pears, by nearness to "apple red": 1, 2, 3; 4 is far."""
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
        clusters = find_clusters(store, store.config)
        writer.replace_behaviours([cluster.draft("fruit: peel") for cluster in clusters], policy_version=0)
    return store


def texts(found):
    return sorted(item.text for item in found)


def test_quotas_are_filled_in_order_and_lessons_take_the_rest(small):
    found = retriever_of(small, k=6).retrieve("apple red", seed=0)
    kinds = sorted(item.kind for item in found)
    assert kinds == ["behaviour", "contrast", "lesson", "lesson", "lesson", "strategy"]
    assert {item.task_id for item in found if item.kind == "lesson"} == {"t1"}  # the nearest problem's
    assert len(retriever_of(small, k=6, max_lessons=1).retrieve("apple red", seed=0)) == 4
    assert [p.kind for p in retriever_of(small, k=1).retrieve("apple red", seed=0)] == ["behaviour"]
    assert len(retriever_of(small, k=50, max_strategies=9).retrieve("apple red", seed=0)) == 1 + 3 + 9


def test_a_text_of_several_near_problems_comes_first(small):
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


def test_kinds(small):
    assert {p.kind for p in retriever_of(small, kinds=["lesson"], k=9).retrieve("apple red", seed=0)} == {"lesson"}


def test_far_problems_are_no_neighbours(small):
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
        with pytest.raises(AlignmentError, match="read-only within an epoch"):
            read()
    retriever.refresh()
    assert retriever.retrieve("apple red", seed=0)


def test_order_is_drawn_from_the_seed_and_batches_change_nothing(small):
    retriever = retriever_of(small, k=6)
    orders = [retriever.retrieve("apple red", seed=seed) for seed in range(8)]
    assert len({tuple(p.item_id for p in order) for order in orders}) > 1
    assert len({frozenset(texts(order)) for order in orders}) == 1
    assert retriever.retrieve_many([Query("apple red", seed) for seed in range(8)]) == orders


def test_an_empty_memory_gives_nothing(open_store):
    retriever = retriever_of(open_store())
    assert retriever.retrieve("anything", seed=0) == []
    assert retriever.retrieve_many([]) == []
    assert retriever.past_success("t") is None


def test_families_are_bound_exactly(world, grown):
    """Every item retrieved for new problems of each family is of that family."""
    retriever = retriever_of(grown, k=8)
    found = retriever.retrieve_many([Query(world.key(name), n) for n, name in enumerate(world.names * 20)])
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
        queries = [Query(world.key(name), 3) for name in world.names]
        assert retriever_of(copy).retrieve_many(queries) == retriever_of(grown).retrieve_many(queries)


def test_clusters_are_the_families(world, grown):
    clusters = find_clusters(grown, grown.config, ("do", "avoid"))
    wise = [cluster for cluster in clusters if cluster.polarity == "do"]
    assert len({cluster.insights[0].text.split()[1] for cluster in wise}) == len(wise) > 20
    for cluster in wise:
        name = cluster.insights[0].text.split()[1]
        assert {insight.text for insight in cluster.insights} == {f"use {name} {world.rule[name]}"}
        assert len(cluster.task_rows) >= grown.config.cluster_support
        assert len(cluster.lessons) <= 3
        assert all(lesson.text.startswith(f"not {name} ") for lesson in cluster.lessons)
        assert cluster.texts == [insight.text for insight in (*cluster.insights, *cluster.lessons)]
    for cluster in clusters:
        assert len({insight.text.split()[1] for insight in cluster.insights}) == 1


def test_behaviours_keep_their_ids_and_unchanged_clusters_need_nothing(open_store):
    store = open_store(cluster_support=2)

    def learn(*insights, text="wash apples"):
        with open_writer(store) as writer:
            for task_id, kind, words in insights:
                writer.add_insight(writer.add_task(make_task(task_id)), kind, words, policy_version=0)
            clusters = find_clusters(store, store.config)
            drafts = [cluster.draft(text if cluster.changed else None) for cluster in clusters]
            return clusters, writer.replace_behaviours(drafts, policy_version=0)

    clusters, ids = learn(("a", "strategy", "wash it"), ("b", "strategy", "wash it"), ("c", "strategy", "other thing"))
    assert [cluster.changed for cluster in clusters] == [True]
    assert [(b.text, b.version, b.support) for b in store.behaviours()] == [("wash apples", 1, 2)]
    clusters, again = learn(("d", "strategy", "wash it"))
    assert [cluster.changed for cluster in clusters] == [False]  # one more problem, the same words
    assert again == ids
    assert [(b.text, b.version, b.support) for b in store.behaviours()] == [("wash apples", 1, 3)]
    clusters, again = learn(("a", "lesson", "never cut"), text="wash, never cut")
    assert [cluster.changed for cluster in clusters] == [True]
    assert again == ids
    assert [(b.text, b.version) for b in store.behaviours()] == [("wash, never cut", 2)]
    failed = [cluster.draft(None) for cluster in find_clusters(store, store.config)]
    with open_writer(store) as writer:
        assert writer.replace_behaviours(failed, policy_version=1) == ids  # abstraction failed: the old one stays
    with open_writer(store) as writer:
        writer.replace_behaviours([], policy_version=1)
    assert store.behaviours() == []
    assert [b.id for b in store.behaviours("retired")] == ids


def test_a_new_cluster_without_words_is_left_out(open_store):
    store = open_store(cluster_support=2)
    with open_writer(store) as writer:
        for task_id in "ab":
            writer.add_insight(writer.add_task(make_task(task_id)), "strategy", "wash it", policy_version=0)
        drafts = [cluster.draft(None) for cluster in find_clusters(store, store.config)]
        assert writer.replace_behaviours(drafts, policy_version=0) == [None]
    assert store.behaviours(None) == []


def test_above_the_cap_further_texts_join_the_nearest_cluster(grown, monkeypatch):
    whole = find_clusters(grown, replace(grown.config, cluster_support=1))
    monkeypatch.setattr("pmd.memory.behaviours.MAX_CLUSTERED_TEXTS", 16)
    capped = find_clusters(grown, replace(grown.config, cluster_support=1))
    assert 0 < len(capped) <= 16 < len(whole)
