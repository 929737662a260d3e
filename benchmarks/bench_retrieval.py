"""Measures how ranks get the memory items of a batch: told by rank 0, or looked up in read-only copies of the memory.

torchrun --nproc-per-node 2 benchmarks/bench_retrieval.py [--sizes 1000 10000 100000] [--tasks 32] [--batches 20]

Every rank needs the items of all tasks of a batch. Three ways: rank 0 looks them up and tells the others, in a message
for each task or in one for all; or each rank looks up its share in a copy of its own, and all exchange what they found.
A copy is made again after every update of the memory: store and index are copied from rank 0's folder and opened.
Prints milliseconds of the slowest rank, medians over batches. The memory is that of bench_memory.py: three insights a
task.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch.distributed as dist
from bench_memory import LookedUp, clustered_vectors, write

from pmd.config.schema import MemoryConfig
from pmd.memory.index import TaskIndex
from pmd.memory.retrieve import Retriever
from pmd.memory.store import MemoryStore
from pmd.ranks import Ranks
from pmd.types import MemoryItem

T = TypeVar("T")
DIMENSION = 384
CONFIG = MemoryConfig(capacity=10**9)


def slowest_ms(ranks: Ranks, action: Callable[[], T]) -> tuple[float, T]:
    """Return the milliseconds of an action on the rank that takes longest, and its result; all begin together."""
    ranks.all(None)
    started = time.perf_counter()
    result = action()
    return 1e3 * max(ranks.all(time.perf_counter() - started)), result


def opened(folder: Path, vectors: np.ndarray) -> Retriever:
    """Open the memory in a folder for retrieval."""
    store = MemoryStore.open(folder / "memory.sqlite", embedder=LookedUp(vectors), config=CONFIG)
    return Retriever(store, TaskIndex.open(store), CONFIG)


def look_up(source: Retriever | None, queries: Sequence[str]) -> list[list[MemoryItem]]:
    """Return the items for each query."""
    assert source is not None
    return [source.retrieve(query, seed=0) for query in queries]


def measure(size: int, arguments: argparse.Namespace, ranks: Ranks, folder: Path) -> dict[str, float]:
    """Return the milliseconds of each way."""
    vectors = clustered_vectors(size + arguments.tasks * arguments.batches, DIMENSION)
    own = folder / str(ranks.rank)
    retriever = None
    if ranks.is_first:
        with MemoryStore.open(own / "memory.sqlite", embedder=LookedUp(vectors), config=CONFIG) as empty:
            write(empty, 0, size)
        retriever = opened(own, vectors)
    copies: list[Retriever] = []

    def copy() -> None:
        shutil.copytree(folder / "0", folder / f"copy-{ranks.rank}")
        copies.append(opened(folder / f"copy-{ranks.rank}", vectors))

    def told_singly(queries: Sequence[str]) -> list[list[MemoryItem]]:
        return [ranks.from_first(partial(look_up, retriever, [query]))[0] for query in queries]

    def told(queries: Sequence[str]) -> list[list[MemoryItem]]:
        return ranks.from_first(partial(look_up, retriever, queries))

    def shared_out(queries: Sequence[str]) -> list[list[MemoryItem]]:
        return ranks.gathered(look_up(copies[0], ranks.share(queries)))

    found = {"copying": slowest_ms(ranks, copy)[0]}
    ways = {"told task by task": told_singly, "told in one message": told, "shared out": shared_out}
    ms: dict[str, list[float]] = {name: [] for name in ways}
    for first in range(size, size + arguments.tasks * arguments.batches, arguments.tasks):
        queries = [f"{number} query" for number in range(first, first + arguments.tasks)]
        answers = []
        for name, way in ways.items():
            took, answer = slowest_ms(ranks, partial(way, queries))
            ms[name].append(took)
            answers.append(answer)
        assert answers[0] == answers[1] == answers[2]
    return found | {name: statistics.median(values) for name, values in ms.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="numbers of tasks")
    parser.add_argument("--tasks", type=int, default=32, help="of a batch (default: 32)")
    parser.add_argument("--batches", type=int, default=20, help="(default: 20)")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    ranks = Ranks(dist.get_rank(), dist.get_world_size())
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as temporary:
            found = measure(size, arguments, ranks, Path(ranks.all(temporary)[0]))
            ranks.all(None)  # nobody removes the folder while another rank uses it
        if ranks.is_first:
            shown = ", ".join(f"{name} {ms:,.1f} ms" for name, ms in found.items())
            print(f"{size:,} tasks, {arguments.tasks} a batch: {shown}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
