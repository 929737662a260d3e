"""The index matches the store or is rebuilt, and finds the nearest tasks."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from memory_world import make_task

from pmd.errors import MemoryStoreError
from pmd.memory.embed import HashEmbedder
from pmd.memory.index import TaskIndex
from pmd.memory.store import MemoryStore
from pmd.memory.update import open_writer


class Fixed:
    """Embeds `n` as the n-th given vector."""

    costly = True

    def __init__(self, vectors: np.ndarray):
        self.vectors = vectors
        self.name = "fixed"
        self.dimension = vectors.shape[1]

    def embed(self, texts):
        return self.vectors[[int(text) for text in texts]]

    def fitted_to(self, texts):
        return self

    def state(self):
        return {"kind": "fixed"}


def clustered(num: int, dimension: int, seed: int = 0) -> np.ndarray:
    """Unit vectors in clusters, as sentence vectors are."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(num // 20, dimension))
    vectors = centres[random.integers(len(centres), size=num)] + 0.6 * random.normal(size=(num, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def fill(store: MemoryStore, start: int, stop: int) -> None:
    with open_writer(store) as writer:
        for n in range(start, stop):
            writer.add_task(make_task(f"t{n}", key=str(n)))


@pytest.fixture
def stored(tmp_path: Path):
    vectors = clustered(700, 48)
    with MemoryStore.open(tmp_path / "m.sqlite", embedder=Fixed(vectors)) as store:
        fill(store, 0, 500)
        yield store


def test_graph_search_equals_exact_search(stored):
    index = TaskIndex.open(stored)
    queries = clustered(700, 48)[500:600]
    exact = index.search(queries, 10, exact=True)
    graph = index.search(queries, 10, exact=False)
    common = sum(len({i for i, _ in a} & {i for i, _ in b}) for a, b in zip(exact, graph, strict=True))
    assert common / 1_000 >= 0.98
    assert [hits[0] for hits in exact] == [hits[0] for hits in graph]
    best = clustered(700, 48)[:500] @ queries[0]
    assert exact[0][0][0] == int(best.argmax()) + 1


def test_more_neighbours_than_tasks(stored, open_store):
    index = TaskIndex.open(stored)
    query = clustered(700, 48)[:1]
    for exact in (True, False):
        assert len(index.search(query, 10_000, exact=exact)[0]) == 500
    empty = TaskIndex.open(open_store())
    assert empty.search(HashEmbedder(64).embed(["a"]), 5) == [[]]


def test_growing_equals_rebuilding(stored):
    index = TaskIndex.open(stored)
    fill(stored, 500, 700)
    index.refresh()
    grown = stored.path.with_name("tasks.hnsw").read_bytes()
    stored.path.with_name("tasks.hnsw").unlink()
    again = TaskIndex.open(stored)
    assert again.rebuilt_because == "there is no index file"
    queries = clustered(300, 48, seed=5)
    assert index.search(queries, 20, exact=False) == again.search(queries, 20, exact=False)
    assert len(again) == 700
    # The file differs in nothing but the room it reserves.
    assert len(stored.path.with_name("tasks.hnsw").read_bytes()) == len(grown)
    loaded = TaskIndex.open(stored)
    assert loaded.rebuilt_because == ""
    assert loaded.search(queries, 20, exact=False) == index.search(queries, 20, exact=False)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def set_in_manifest(key: str, value):
    def change(path: Path) -> None:
        manifest = json.loads(path.with_suffix(".json").read_text())
        manifest[key] = value
        path.with_suffix(".json").write_text(json.dumps(manifest))

    return change


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (flip_bit, "sha256"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "sha256"),
        (lambda path: path.write_bytes(b""), "sha256"),
        (lambda path: path.unlink(), "no index file"),
        (lambda path: path.with_suffix(".json").unlink(), "no index file"),
        (lambda path: path.with_suffix(".json").write_text("{"), "manifest is damaged"),
        (lambda path: path.with_suffix(".json").write_text("[]"), "manifest differs"),
        (set_in_manifest("dimension", 47), "dimension"),
        (set_in_manifest("space", "l2"), "space"),
        (set_in_manifest("embedder", "other"), "embedder"),
        (set_in_manifest("count", 499), "count"),
        (set_in_manifest("generation", 9), "generation"),
        (set_in_manifest("vectors_sha256", "0"), "vectors_sha256"),
    ],
)
def test_any_mismatch_rebuilds(stored, harm, reason):
    path = stored.path.with_name("tasks.hnsw")
    TaskIndex.open(stored)
    whole = path.read_bytes()
    assert TaskIndex.open(stored).rebuilt_because == ""
    harm(path)
    index = TaskIndex.open(stored)
    assert reason in index.rebuilt_because
    assert path.read_bytes() == whole
    assert TaskIndex.open(stored).rebuilt_because == ""


def test_an_index_behind_the_store_is_rebuilt(stored):
    TaskIndex.open(stored)
    fill(stored, 500, 501)
    index = TaskIndex.open(stored)
    assert "count" in index.rebuilt_because
    assert len(index) == 501


def test_what_is_no_unit_vector_is_refused(stored):
    index = TaskIndex.open(stored)
    query = clustered(40, 48)[:1]
    for bad in (query * np.nan, query * 2, query[:, :40]):
        with pytest.raises(MemoryStoreError, match="embedding"):
            index.search(bad, 3)
    stored.embedder.vectors[600] = np.nan
    with pytest.raises(MemoryStoreError, match="embedding length=nan of 1 of 1 texts must be 1"):
        fill(stored, 600, 601)
    assert len(stored.tasks()) == 500


def test_without_hnswlib_all_search_is_exact(stored, monkeypatch, caplog):
    queries, found = stored.vectors("tasks")[1][:20], TaskIndex.open(stored)
    wanted = found.search(queries, 5, exact=True)
    for file in stored.path.parent.glob("tasks.*"):
        file.unlink()
    monkeypatch.setitem(sys.modules, "hnswlib", None)  # as if it were not installed
    index = TaskIndex.open(stored)
    assert index.search(queries, 5) == wanted
    assert (len(index), index.recall(), index.mismatch()) == (500, 1.0, "")
    assert "searched exactly" in caplog.text
    fill(stored, 500, 600)
    index.refresh()
    assert len(index) == 600
    assert list(stored.path.parent.glob("tasks.*")) == []
