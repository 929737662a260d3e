"""Finds the training tasks nearest to a query. Tasks are indexed, not items: a task's items share its vector.

The index can always be rebuilt from the store. It is built in id order on one thread, so equal stores have
byte-identical indexes. The hnswlib graph is built and saved at every size; below `EXACT_BELOW` tasks, queries use exact
search, which is faster there. hnswlib loads damaged files silently, so a file is used only if it matches its manifest
and the store's vectors; otherwise the index is rebuilt. Where hnswlib is not installed, because it has no wheels and
there was no compiler, there is no graph, and all search is exact.
"""

import contextlib
import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pmd.errors import MemoryStoreError
from pmd.memory.embed import validated
from pmd.memory.store import MemoryStore

if TYPE_CHECKING:
    import hnswlib

log = logging.getLogger(__name__)
EXACT_BELOW = 2_000
CONNECTIVITY = 16  # M
EF_CONSTRUCTION = 100  # 200 takes 1.6 times as long to build, with the same recall at 100,000 tasks
EF_SEARCH = 64
TASKS_PER_EF = 1_000  # recall@10 on a million clustered tasks: .98 with this ef, .8 with a fixed one
SEED = 100
RECALL_QUERIES = 64
SIMILARITY_DECIMALS = 5  # equal tasks tie, whatever the summation order of the dot product


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an index file must match to be used."""

    sha256: str  # of the file
    vectors_sha256: str  # of ids and vectors in it
    space: str
    dimension: int
    embedder: str
    count: int
    generation: int  # the update that last added a task


class TaskIndex:
    """An index of tasks for nearest-neighbour search; read-only between calls of `refresh`."""

    def __init__(self, store: MemoryStore):
        self._store = store
        self._dimension = store.embedder.dimension
        self._path = store.path.with_name("tasks.hnsw")
        self._ids = np.zeros(0, dtype=np.int64)
        self._vectors = np.zeros((0, self._dimension), dtype=np.float32)
        self._graph: hnswlib.Index | None = None
        self._complete_history = False  # every point was added by this object, so appending equals rebuilding
        self.rebuilt_because = ""  # why the file on disk was not used; empty if it was

    @classmethod
    def open(cls, store: MemoryStore) -> "TaskIndex":
        """Load the index file if it matches the store exactly, else rebuild it."""
        index = cls(store)
        if not store.read_only and not has_graphs():
            log.warning(
                "hnswlib is not installed, so the memory is searched exactly: slower from about 100,000 tasks on. To "
                "install it, `pip install hnswlib` needs a C++ compiler."
            )
        if store.read_only or not has_graphs():  # a graph may be a stranger's, and hnswlib does not check what it loads
            index.refresh()
            return index
        ids, vectors = store.vectors("tasks")
        index.rebuilt_because = index._load(ids, vectors)
        if index.rebuilt_because:
            index.refresh()
        return index

    def mismatch(self) -> str:
        """Return why the index file does not match the store; empty if it does, or if none is used."""
        if not has_graphs():
            return ""
        return self._mismatch(*self._store.vectors("tasks"))

    def __len__(self) -> int:
        return len(self._ids)

    def refresh(self) -> None:
        """Update the index from the store and save it. Appending and rebuilding give the same graph."""
        ids, vectors = self._store.vectors("tasks")
        vectors = validated(vectors, self._dimension)
        old = len(self._ids)
        same_start = old <= len(ids) and np.array_equal(ids[:old], self._ids)
        if self._graph is not None and same_start and old == len(ids):
            return
        if self._store.read_only or not has_graphs():  # a reader must not write, and its few queries need no graph
            self._graph, self._ids, self._vectors = None, ids, vectors
            return
        if self._graph is None or not self._complete_history or not same_start:
            self._graph, old = self._new_graph(_capacity(len(ids))), 0
        if len(ids) > self._graph.get_max_elements():
            self._graph.resize_index(_capacity(len(ids)))
        if len(ids) > old:
            self._graph.add_items(vectors[old:], ids[old:], num_threads=1)
        self._ids, self._vectors, self._complete_history = ids, vectors, True
        self._save()

    def search(self, queries: np.ndarray, k: int, *, exact: bool | None = None) -> list[list[tuple[int, float]]]:
        """Return for each query the k nearest tasks (fewer if there are fewer), nearest first, ties by id.

        Args:
            queries: unit vectors [n, D].
            exact: None chooses by size.
        """
        queries = validated(queries, self._dimension)
        k = min(k, len(self._ids))
        if k == 0:
            return [[] for _ in queries]
        if exact is None:
            exact = self._graph is None or len(self._ids) < EXACT_BELOW
        if exact:
            return [self._search_exact(query, k) for query in queries]
        assert self._graph is not None
        # ef is not saved with the graph, and must be at least k.
        self._graph.set_ef(max(EF_SEARCH, 2 * k, len(self._ids) // TASKS_PER_EF))
        labels, distances = self._graph.knn_query(queries, k=k, num_threads=1)
        similarities = np.round(1.0 - distances.astype(np.float64), SIMILARITY_DECIMALS)
        return [
            sorted(zip(map(int, row), map(float, near), strict=True), key=lambda hit: (-hit[1], hit[0]))
            for row, near in zip(labels, similarities, strict=True)
        ]

    def recall(self, k: int = 10) -> float | None:
        """Return the share of the k nearest tasks that `search` finds for the store's own tasks; None without tasks."""
        if len(self._ids) == 0:
            return None
        rows = np.linspace(0, len(self._ids) - 1, min(RECALL_QUERIES, len(self._ids))).astype(int)
        found, exact = self.search(self._vectors[rows], k), self.search(self._vectors[rows], k, exact=True)
        common = sum(len({i for i, _ in one} & {i for i, _ in other}) for one, other in zip(found, exact, strict=True))
        return common / sum(map(len, exact))

    def _search_exact(self, query: np.ndarray, k: int) -> list[tuple[int, float]]:
        similarities = np.round((self._vectors @ query).astype(np.float64), SIMILARITY_DECIMALS)
        nearest = np.argsort(-similarities, kind="stable")[:k]
        return [(int(self._ids[row]), float(similarities[row])) for row in nearest]

    def _new_graph(self, size: int) -> "hnswlib.Index":
        import hnswlib

        graph = hnswlib.Index(space="ip", dim=self._dimension)
        graph.init_index(max_elements=size, M=CONNECTIVITY, ef_construction=EF_CONSTRUCTION, random_seed=SEED)
        graph.set_num_threads(1)
        return graph

    def _manifest(self, file_sha: str, ids: np.ndarray, vectors: np.ndarray) -> Manifest:
        digest = hashlib.sha256(ids.astype("<i8").tobytes())
        digest.update(np.ascontiguousarray(vectors, dtype="<f4").data)
        generation = self._store.query("SELECT coalesce(max(generation), 0) FROM tasks")[0][0]
        name = self._store.embedder.name
        return Manifest(file_sha, digest.hexdigest(), "ip", self._dimension, name, len(ids), generation)

    @property
    def _manifest_path(self) -> Path:
        return self._path.with_suffix(".json")

    def _save(self) -> None:
        """Write graph and manifest, each to a temporary file that then replaces the old one."""
        partial, manifest_partial = self._path.with_suffix(".partial"), self._manifest_path.with_suffix(".json.partial")
        try:
            self._write(partial, manifest_partial)
        except (OSError, RuntimeError) as error:
            for left in (partial, manifest_partial):
                with contextlib.suppress(OSError):
                    left.unlink(missing_ok=True)
            reason = f" ({error.strerror})" if isinstance(error, OSError) and error.strerror else ""
            raise MemoryStoreError(
                f"memory index={self._path} could not be written whole{reason}; check free disk space and permissions. "
                "The store itself is unharmed: the index is rebuilt from it."
            ) from error

    def _write(self, partial: Path, manifest_partial: Path) -> None:
        assert self._graph is not None
        self._graph.save_index(str(partial))
        if not partial.exists() or partial.stat().st_size != self._graph.index_file_size():  # hnswlib does not raise
            raise OSError
        _sync(partial)
        manifest = self._manifest(_file_sha(partial), self._ids, self._vectors)
        manifest_partial.write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")
        _sync(manifest_partial)
        os.replace(partial, self._path)
        os.replace(manifest_partial, self._manifest_path)

    def _mismatch(self, ids: np.ndarray, vectors: np.ndarray) -> str:
        """Return why file and manifest do not match the store; empty if they do."""
        if not self._path.exists() or not self._manifest_path.exists():
            return "there is no index file"
        try:
            found = json.loads(self._manifest_path.read_text(encoding="utf-8"))
            wanted = asdict(self._manifest(_file_sha(self._path), ids, vectors))
        except (OSError, ValueError, RecursionError):
            return "its manifest is damaged, or the file cannot be read"
        wrong = [key for key in wanted if not isinstance(found, dict) or found.get(key) != wanted[key]]
        return f"its manifest differs from file or store in {', '.join(wrong)}" if wrong else ""

    def _load(self, ids: np.ndarray, vectors: np.ndarray) -> str:
        """Load the file if it matches the store; return why it does not, empty on success."""
        if problem := self._mismatch(ids, vectors):
            return problem
        import hnswlib

        graph = hnswlib.Index(space="ip", dim=self._dimension)
        graph.load_index(str(self._path), max_elements=max(len(ids), 1))
        graph.set_num_threads(1)
        if not np.array_equal(np.sort(np.array(graph.get_ids_list(), dtype=np.int64)), ids):
            return "it holds other tasks than the store"
        self._graph, self._ids, self._vectors = graph, ids, vectors
        return ""


def has_graphs() -> bool:
    """Whether hnswlib is installed."""
    return find_spec("hnswlib") is not None


def _capacity(count: int) -> int:
    """Return the places of a graph, which its file tells: a power of two, however the points came."""
    return 1 << max(0, count - 1).bit_length()


def _file_sha(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
