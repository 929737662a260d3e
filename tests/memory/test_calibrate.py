"""Thresholds in the embedder's own scale: clusters form on prose, and distinct insights stay apart."""

from dataclasses import replace

import numpy as np
import pytest
from prose import DATA, TOPIC_OF, TOPICS, cluster_prose, merge_pairs, purity

from pmd.memory.calibrate import CLUSTER, MERGE, MIN_TEXTS, Similarities, calibrate, choose_texts
from pmd.memory.embed import HashEmbedder
from pmd.memory.update import open_writer


def vectors_of(similarities: np.ndarray) -> np.ndarray:
    """Unit vectors with these inner products."""
    values, axes = np.linalg.eigh(similarities)
    return axes * np.sqrt(np.clip(values, 0, None))


def pairs_of(inside: float, outside: float, count: int = 8) -> np.ndarray:
    """Similarities of `count` pairs: `inside` a pair and `outside` it."""
    alike = np.full((2 * count, 2 * count), outside)
    for first in range(0, 2 * count, 2):
        alike[first, first + 1] = alike[first + 1, first] = inside
    np.fill_diagonal(alike, 1.0)
    return alike


@pytest.mark.parametrize(("inside", "outside"), [(0.5, 0.1), (0.9, 0.7)])
def test_half_way_between_background_and_nearest_neighbours(inside, outside):
    found = calibrate(vectors_of(pairs_of(inside, outside)), range(16))
    assert found.cluster == pytest.approx((inside + outside) / 2, abs=1e-3)
    assert found.merge == pytest.approx((1 + inside) / 2, abs=1e-3)


def test_texts_of_one_task_are_not_compared():
    vectors = vectors_of(pairs_of(0.9, 0.1))
    assert calibrate(vectors, [n // 2 for n in range(16)]).cluster == pytest.approx(0.1, abs=1e-3)
    assert calibrate(vectors, [0] * 16) == Similarities(CLUSTER, MERGE)


def test_unrelated_texts_stay_apart():
    draws = np.random.default_rng(0).normal(size=(200, 50))
    vectors = draws / np.linalg.norm(draws, axis=1, keepdims=True)
    spread = 1 / np.sqrt(50)
    assert calibrate(vectors, range(200)).cluster == pytest.approx(2 * spread, rel=0.1)


def test_too_few_texts_are_not_measured():
    vectors = vectors_of(pairs_of(0.5, 0.1))
    assert calibrate(vectors[: MIN_TEXTS - 1], range(MIN_TEXTS - 1)) == Similarities(CLUSTER, MERGE)
    assert calibrate(vectors[:MIN_TEXTS], range(MIN_TEXTS)) != Similarities(CLUSTER, MERGE)


def test_the_sample_is_the_same_every_time():
    assert choose_texts(3) == [0, 1, 2]
    assert choose_texts(5000) == choose_texts(5000)
    assert len(set(choose_texts(5000))) == 512
    assert max(choose_texts(5000)) > 4000


def test_hashed_words_form_clusters_on_prose(tmp_path):
    embedder = HashEmbedder.fit([f"question t{n}" for n in range(60)])
    clusters, store = cluster_prose(tmp_path / "m.sqlite", embedder)
    assert len({topic for cluster in clusters for topic in cluster}) >= 8
    assert sum(map(len, clusters)) >= 40
    assert purity(clusters) >= 0.75  # the nearest neighbour of one insight in three is of another topic
    assert max(map(len, clusters)) <= max(map(len, TOPICS.values()))
    noted = store.stats()
    assert 0.1 < noted["cluster_similarity"] < 0.2
    assert 0.7 < noted["merge_similarity"] < 0.8
    assert sum(merge_pairs(store, DATA["same"])) >= 3
    assert merge_pairs(store, DATA["different"]) == [False] * 4
    store.close()


def test_the_same_insights_give_the_same_update(tmp_path):
    embedder = HashEmbedder.fit(list(TOPIC_OF))
    found = [cluster_prose(tmp_path / f"{n}.sqlite", embedder) for n in range(2)]
    assert found[0][0] == found[1][0]
    dumps = [list(store.db.iterdump()) for _, store in found]
    assert dumps[0] == dumps[1]
    assert any("'cluster_similarity','0.1" in line for line in dumps[0])
    for _, store in found:
        store.close()


def test_given_thresholds_are_used(tmp_path):
    embedder = HashEmbedder.fit(list(TOPIC_OF))
    clusters, store = cluster_prose(tmp_path / "m.sqlite", embedder, cluster_similarity=0.6, merge_similarity=0.9)
    assert clusters == []
    assert (store.stats()["cluster_similarity"], store.stats()["merge_similarity"]) == (0.6, 0.9)
    store.config = replace(store.config, cluster_similarity=None)
    with open_writer(store) as writer:
        assert writer.clusters()
    store.close()
