"""Clusters of insights, and the ids of the behaviours made from them."""

from dataclasses import replace

from memory_world import make_task

from pmd.memory.behaviours import describe_absence, find_clusters
from pmd.memory.embed import HashEmbedder
from pmd.memory.update import open_writer


def test_clusters_are_the_families(world, grown):
    clusters, _ = find_clusters(grown, grown.config)
    assert len({cluster.insights[0].text.split()[1] for cluster in clusters}) == len(clusters) > 20
    for cluster in clusters:
        name = cluster.insights[0].text.split()[1]
        assert {insight.text for insight in cluster.insights} == {f"use {name} {world.rule[name]}"}
        assert len(cluster.task_rows) >= grown.config.cluster_support
        assert len(cluster.lessons) <= 3
        assert all(lesson.text.startswith(f"not {name} ") for lesson in cluster.lessons)
        assert cluster.texts == [insight.text for insight in (*cluster.insights, *cluster.lessons)]
        assert cluster.behaviour is not None
        assert not cluster.needs_text
    support = [len(cluster.task_rows) for cluster in clusters]
    assert support == sorted(support, reverse=True)


def test_behaviours_keep_their_ids_and_unchanged_clusters_need_nothing(open_store):
    store = open_store(cluster_support=2)

    def learn(*insights, text="wash apples"):
        with open_writer(store) as writer:
            for task_id, kind, words in insights:
                writer.add_insight(writer.add_task(make_task(task_id)), kind, words, policy_version=0)
            clusters = writer.clusters()
            changes = [cluster.change(text if cluster.needs_text else None) for cluster in clusters]
            return clusters, writer.replace_behaviours(changes, policy_version=0)

    clusters, ids = learn(("a", "strategy", "wash it"), ("b", "strategy", "wash it"), ("c", "strategy", "other thing"))
    assert [cluster.needs_text for cluster in clusters] == [True]
    assert [(b.text, b.version, b.support) for b in store.behaviours()] == [("wash apples", 1, 2)]
    clusters, again = learn(("d", "strategy", "wash it"))
    assert [cluster.needs_text for cluster in clusters] == [False]  # one more task, the same words
    assert again == ids
    assert [(b.text, b.version, b.support) for b in store.behaviours()] == [("wash apples", 1, 3)]
    clusters, again = learn(("a", "lesson", "never cut"), text="wash, never cut")
    assert [cluster.needs_text for cluster in clusters] == [True]
    assert again == ids
    assert [(b.text, b.version) for b in store.behaviours()] == [("wash, never cut", 2)]
    with open_writer(store) as writer:
        failed = [cluster.change(None) for cluster in writer.clusters()]
        assert writer.replace_behaviours(failed, policy_version=1) == ids  # abstraction failed: the old one stays
    with open_writer(store) as writer:
        writer.replace_behaviours([], policy_version=1)
    assert store.behaviours() == []
    assert [b.id for b in store.behaviours("retired")] == ids


def test_tasks_can_be_clustered_instead_of_insights(open_store):
    keys = ["apple red", "apple red big", "pear brown", "pear brown old", "fig"]
    store = open_store(embedder=HashEmbedder.fit(keys, dimension=256), cluster_over="tasks", cluster_similarity=0.4)
    with open_writer(store) as writer:
        for n, key in enumerate(keys):
            row = writer.add_task(make_task(f"t{n}", key=key))
            writer.add_insight(row, "strategy", f"idea {'abcde'[n]}", policy_version=0)
            writer.add_insight(row, "contrast", "said of everything", policy_version=0)
            writer.add_insight(row, "lesson", f"never {'abcde'[n]}", policy_version=0)
        clusters = writer.clusters()
    assert [cluster.task_rows for cluster in clusters] == [(1, 2), (3, 4)]
    assert [set(cluster.texts) for cluster in clusters] == [
        {"said of everything", "idea a", "idea b", "never a", "never b"},
        {"said of everything", "idea c", "idea d", "never c", "never d"},
    ]
    assert not set(clusters[0].member_ids) & set(clusters[1].member_ids)


def test_a_new_cluster_without_words_is_left_out(open_store):
    store = open_store(cluster_support=2)
    with open_writer(store) as writer:
        for task_id in "ab":
            writer.add_insight(writer.add_task(make_task(task_id)), "strategy", "wash it", policy_version=0)
        changes = [cluster.change(None) for cluster in writer.clusters()]
        assert writer.replace_behaviours(changes, policy_version=0) == [None]
    assert store.behaviours(None) == []


def test_above_the_cap_further_texts_join_the_nearest_cluster(grown, monkeypatch):
    whole, _ = find_clusters(grown, replace(grown.config, cluster_support=1))
    monkeypatch.setattr("pmd.memory.behaviours.MAX_CLUSTERED_TEXTS", 16)
    capped, _ = find_clusters(grown, replace(grown.config, cluster_support=1))
    assert 0 < len(capped) <= 16 < len(whole)


def test_lessons_alone_make_no_behaviour_and_a_single_task_none(open_store):
    store = open_store(cluster_support=2)
    with open_writer(store) as writer:
        for task_id in "ab":
            writer.add_insight(writer.add_task(make_task(task_id)), "lesson", "never cut", policy_version=0)
        writer.add_insight(writer.add_task(make_task("a")), "strategy", "wash it", policy_version=0)
        assert writer.clusters() == []


def test_a_behaviour_whose_tasks_are_gone_is_retired(open_store):
    store = open_store(cluster_support=2)
    with open_writer(store) as writer:
        ids = [
            writer.add_insight(writer.add_task(make_task(task_id)), "strategy", "wash it", policy_version=0)
            for task_id in "ab"
        ]
        writer.replace_behaviours([c.change("wash") for c in writer.clusters()], policy_version=0)
    with open_writer(store) as writer:
        writer.set_status(1, ids[0], "retired", "test")
        writer.replace_behaviours([c.change(None) for c in writer.clusters()], policy_version=1)
    assert [b.status for b in store.behaviours(None)] == ["retired"]


def test_why_there_is_no_behaviour(open_store):
    store = open_store(cluster_similarity=0.99)
    words = ["ash", "bay", "cob", "dew", "elm", "fig", "gum", "hop", "ivy", "jam", "kin", "lap"]
    assert describe_absence(store, store.config, 0) == ""
    with open_writer(store) as writer:
        for word in words:
            writer.add_insight(writer.add_task(make_task(word)), "strategy", f"look at the {word}", policy_version=0)
        assert writer.clusters() == []
    told = describe_absence(store, store.config, 0)
    assert "of 12 insights on 12 tasks, no cluster rests on 2 tasks at a similarity of 0.99" in told
    assert "none of 3 clusters" in describe_absence(store, store.config, 3)
    for unwanted in ({"levels": [0, 1]}, {"kinds": ["lesson"]}, {"max_behaviours": 0}):
        assert describe_absence(store, replace(store.config, **unwanted), 0) == ""
    with open_writer(store) as writer:
        writer.set_status(1, 1, "retired", "test")
    assert describe_absence(store, store.config, 0) == ""  # eleven are too few to expect one
    with open_writer(store) as writer:
        for number in range(1, 13):
            writer.set_status(1, number, "quarantined", "test")
    assert "12 are quarantined" in describe_absence(store, store.config, 0)
