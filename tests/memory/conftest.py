from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from memory_world import World

from pmd.config.schema import MemoryConfig
from pmd.memory.embed import HashEmbedder
from pmd.memory.store import MemoryStore

#: Lines of the small world's language share most of their words, and identical ones alone form a cluster.
THRESHOLDS = {"cluster_similarity": 0.6, "merge_similarity": 0.92}


@pytest.fixture(scope="session")
def world() -> World:
    return World()


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., MemoryStore]]:
    stores: list[MemoryStore] = []

    def open_one(name: str = "memory.sqlite", *, embedder: HashEmbedder | None = None, **config: object) -> MemoryStore:
        settings = MemoryConfig(**{**THRESHOLDS, **config})  # type: ignore[arg-type]
        stores.append(MemoryStore.open(tmp_path / name, embedder=embedder or HashEmbedder(64), config=settings))
        return stores[-1]

    yield open_one
    for store in stores:
        store.close()


@pytest.fixture(scope="session")
def grown(world: World, tmp_path_factory: pytest.TempPathFactory) -> MemoryStore:
    """Three epochs of the world; tests only read it."""
    path = tmp_path_factory.mktemp("grown") / "memory.sqlite"
    store = MemoryStore.open(path, embedder=world.embedder(), config=MemoryConfig(**THRESHOLDS))
    for epoch in range(3):
        world.write_epoch(store, epoch)
    return store
