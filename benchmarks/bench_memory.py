"""How the memory's cost grows with its size: retrieval latency, epoch update, index recall, file and process size.

    python benchmarks/bench_memory.py --sizes 1000 10000 100000 --json memory.json --plot memory.png

Tasks have clustered unit vectors, as sentence vectors are; each has three insights. A query is a whole retrieval:
index search, joining items, quotas. The update adds new tasks and items, commits, and refreshes index and retriever.
The embedder's own time is excluded (vectors are looked up), SQLite's and hnswlib's are included.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pmd.config.schema import MemoryConfig
from pmd.memory.index import TaskIndex
from pmd.memory.retrieve import Retriever
from pmd.memory.store import MemoryStore
from pmd.memory.update import open_writer
from pmd.types import Message, Task

INSIGHTS_PER_TASK = 3


class LookedUp:
    """An embedder that looks vectors up: each text begins with the number of its vector."""

    costly = False

    def __init__(self, vectors: np.ndarray):
        self.vectors = vectors
        self.name = "benchmark"
        self.dimension = vectors.shape[1]

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return self.vectors[[int(text.split(" ", 1)[0]) for text in texts]]

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        return self.embed(texts)

    def fitted_to(self, texts: Sequence[str]) -> "LookedUp":
        return self

    def state(self) -> dict[str, object]:
        return {"kind": "benchmark"}


def clustered_vectors(count: int, dimension: int) -> np.ndarray:
    random = np.random.default_rng(0)
    centres = random.normal(size=(max(1, count // 20), dimension)).astype(np.float32)
    vectors = centres[random.integers(len(centres), size=count)]
    vectors += 0.7 * random.standard_normal(size=vectors.shape, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write(store: MemoryStore, start: int, stop: int) -> None:
    with open_writer(store) as writer:
        for n in range(start, stop):
            task = Task(f"t{n}", (Message("user", f"{n} question"),), "exact", "train", memory_key=f"{n} key")
            task_row = writer.add_task(task)
            for kind in ("strategy", "lesson", "lesson"):
                text = f"{n} {kind} that says in some twenty words what an attempt at this task has taught"
                writer.add_insight(task_row, kind, text, policy_version=0)


def measure(size: int, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    new = arguments.new_items // INSIGHTS_PER_TASK
    vectors = clustered_vectors(size + new + arguments.queries, arguments.dimension)
    config = MemoryConfig(capacity=10**9)
    store = MemoryStore.open(folder / f"{size}.sqlite", embedder=LookedUp(vectors), config=config)
    clock = time.perf_counter()
    step = max(10_000, size // 10)
    for start in range(0, size, step):
        write(store, start, min(size, start + step))
    result: dict[str, float] = {"tasks": size, "insights": size * INSIGHTS_PER_TASK}
    result["write_s"] = time.perf_counter() - clock
    clock = time.perf_counter()
    index = TaskIndex.open(store)
    result["index_build_s"] = time.perf_counter() - clock
    retriever = Retriever(store, index, config)
    latencies, cpu = [], []
    for n in track(range(arguments.queries), description=f"{size} tasks", transient=True):
        clock, cpu_clock = time.perf_counter(), time.thread_time()
        retriever.retrieve(f"{size + new + n} query", seed=n)
        latencies.append(1e3 * (time.perf_counter() - clock))
        cpu.append(1e3 * (time.thread_time() - cpu_clock))  # excludes delays on a busy machine
    result["query_p50_ms"], result["query_p99_ms"] = np.percentile(latencies, [50, 99])
    result["query_cpu_p50_ms"], result["query_cpu_p99_ms"] = np.percentile(cpu, [50, 99])
    queries = vectors[size + new :][:200]
    exact, graph = (index.search(queries, 10, exact=exact) for exact in (True, False))
    common = sum(len({i for i, _ in a} & {i for i, _ in b}) for a, b in zip(exact, graph, strict=True))
    result["recall_at_10"] = common / sum(map(len, exact))
    clock = time.perf_counter()
    write(store, size, size + new)
    result["update_write_s"] = time.perf_counter() - clock
    retriever.refresh()
    result["update_s"] = time.perf_counter() - clock
    clock = time.perf_counter()
    store.close()
    store = MemoryStore.open(store.path, embedder=LookedUp(vectors), config=config)
    result["open_s"] = time.perf_counter() - clock
    clock = time.perf_counter()
    TaskIndex.open(store)
    result["index_load_s"] = time.perf_counter() - clock
    store.close()
    result["file_mb"] = store.path.stat().st_size / 1e6
    result["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return result


def draw(results: list[dict[str, float]], path: Path) -> None:
    """Plot what grows with the number of tasks, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    sizes = [result["tasks"] for result in results]
    curves = {
        "one query, ms": {
            "query_p99_ms": "99th percentile",
            "query_cpu_p99_ms": "99th percentile, CPU time",
            "query_p50_ms": "median",
        },
        "seconds": {"index_build_s": "index from nothing", "update_s": "update", "open_s": "opening"},
        "MB": {"peak_memory_mb": "process, at most", "file_mb": "file"},
    }  # fmt: skip
    for axis, (title, named) in zip(axes, curves.items(), strict=True):
        for key, label in named.items():
            axis.plot(sizes, [result[key] for result in results], marker="o", label=label)
        axis.set(xscale="log", yscale="log", title=title, xlabel="tasks")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000], help="numbers of tasks")
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--new-items", type=int, default=2_000, help="insights that the measured update adds")
    parser.add_argument("--json", type=Path, help="keep the figures here; sizes that it holds are not measured again")
    parser.add_argument("--plot", type=Path, help="draw cost against size here")
    arguments = parser.parse_args()
    kept = arguments.json is not None and arguments.json.exists()
    results = json.loads(arguments.json.read_text(encoding="utf-8")) if kept else []
    for size in sorted(set(arguments.sizes) - {result["tasks"] for result in results}):
        with tempfile.TemporaryDirectory() as folder:
            results = sorted([*results, measure(size, arguments, Path(folder))], key=lambda result: result["tasks"])
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    table = Table(title=f"memory at {arguments.dimension} dimensions", header_style="bold")
    table.add_column("quantity")
    for result in results:
        table.add_column(f"{result['tasks']:,}", justify="right")
    for key in results[0]:
        table.add_row(key, *(f"{result[key]:,.3f}" if key not in ("tasks", "insights") else f"{result[key]:,}"
                             for result in results))  # fmt: skip
    Console().print(table)
    if arguments.plot:
        draw(results, arguments.plot)


if __name__ == "__main__":
    main()
