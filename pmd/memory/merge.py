"""Insights of one problem that say the same in other words: one stays, with the evidence of all.

Same problem and same kind only: across problems a text must stay with the problem that it is retrieved by (behaviours
are what joins problems), and a lesson never merges with a strategy.
"""

from collections.abc import Iterable

import numpy as np

from pmd.memory.embed import Embedder
from pmd.memory.ledger import Ledger
from pmd.memory.records import LIVE, blobs_to_matrix

Row = tuple[int, str, int, bytes | None]  # id, text, support, stored vector


def merge_insights(ledger: Ledger, embedder: Embedder, problem_ids: Iterable[int], similarity: float) -> int:
    """Unite the live insights of each problem that are at least this similar; returns how many were merged away."""
    groups: list[list[Row]] = []
    for problem_id in sorted(set(problem_ids)):
        kinds: dict[str, list[Row]] = {}
        for kind, *row in ledger.db.execute(
            f"SELECT kind, id, content, support, embedding FROM insights WHERE problem_id = ? AND +{LIVE} ORDER BY id",
            (problem_id,),
        ):
            kinds.setdefault(kind, []).append(tuple(row))  # pyright: ignore[reportArgumentType]
        groups += [rows for rows in kinds.values() if len(rows) > 1]
    if not groups:
        return 0
    vectors = _vectors(embedder, [row for rows in groups for row in rows])
    num_merged, start = 0, 0
    for rows in groups:
        num_merged += _merge_group(ledger, rows, vectors[start : start + len(rows)], similarity)
        start += len(rows)
    return num_merged


def _vectors(embedder: Embedder, rows: list[Row]) -> np.ndarray:
    """Return one vector a row: the stored ones where there are any. Words that no problem has weigh most."""
    if embedder.costly:
        return blobs_to_matrix((row[3] for row in rows if row[3] is not None), embedder.dimension)
    return embedder.embed([row[1] for row in rows])


def _merge_group(ledger: Ledger, rows: list[Row], vectors: np.ndarray, similarity: float) -> int:
    """Fold each insight into the best supported one that it resembles; the oldest of equals stays."""
    alike = np.round(vectors @ vectors.T, 5)
    kept: list[int] = []
    support = [row[2] for row in rows]
    for position in sorted(range(len(rows)), key=lambda n: (-rows[n][2], rows[n][0])):
        twin = next((other for other in kept if alike[position, other] >= similarity), None)
        if twin is None:
            kept.append(position)
            continue
        support[twin] += rows[position][2]
        evidence = [*ledger.parents(1, rows[twin][0]), *ledger.parents(1, rows[position][0])]
        ledger.change(1, rows[twin][0], {"support": support[twin]}, f"merged with {rows[position][0]}", evidence)
        ledger.change(1, rows[position][0], {"status": "retired", "support": 0}, f"merged into {rows[twin][0]}")
    return len(rows) - len(kept)
