"""How well the memory does, in figures to be logged, and its items as one table.

Enter: a store, its index, the policy's version. Leave: numbers by name; rows. Reads only.
"""

from typing import Any

import numpy as np

from pmd.memory.index import ProblemIndex
from pmd.memory.records import LIVE
from pmd.memory.store import MemoryStore

RECALL_QUERIES = 64
TABLE_ROWS = 200


def health(store: MemoryStore, index: ProblemIndex, policy_version: int) -> dict[str, float]:
    """Return the figures; one that has nothing to measure yet is left out."""
    figures: dict[str, float | None] = {
        "age_policy_steps": _one(
            store, f"SELECT avg(? - last_policy_version) FROM insights WHERE {LIVE}", policy_version
        ),
        "duplicate_share": _one(
            store, f"SELECT 1.0 - count(DISTINCT kind || ':' || content) * 1.0 / count(*) FROM insights WHERE {LIVE}"
        ),
        "leak_rate": _one(store, "SELECT avg(status = 'quarantined') FROM insights"),
        "absorbed_rate": _one(store, f"SELECT avg(status = 'absorbed') FROM insights WHERE {LIVE}"),
        "audited_share": _one(store, f"SELECT avg(usefulness IS NOT NULL) FROM insights WHERE {LIVE}"),
        "usefulness_insights": _one(store, f"SELECT avg(usefulness) FROM insights WHERE {LIVE}"),
        "usefulness_behaviours": _one(store, f"SELECT avg(usefulness) FROM behaviours WHERE {LIVE}"),
        "harmful_share": _one(
            store,
            "SELECT 1.0 * (SELECT count(*) FROM (SELECT DISTINCT level, item_id FROM ops"
            " WHERE reason LIKE 'audit: harmful%'))"
            " / nullif((SELECT count(*) FROM (SELECT DISTINCT level, item_id FROM ops WHERE reason LIKE 'audit%')), 0)",
        ),
        "placebo_gap": _one(
            store,
            "SELECT avg(lift_correct) FROM audits WHERE generation = (SELECT max(generation) FROM audits)",
        ),
        "recall_at_10": recall(store, index),
    }
    return {name: value for name, value in figures.items() if value is not None}


def recall(store: MemoryStore, index: ProblemIndex) -> float | None:
    """Return the share of the ten nearest problems that retrieval's own search finds, on problems of the store."""
    _, vectors = store.vectors("problems")
    if len(vectors) == 0:
        return None
    queries = vectors[np.linspace(0, len(vectors) - 1, min(RECALL_QUERIES, len(vectors))).astype(int)]
    found, exact = index.search(queries, 10), index.search(queries, 10, exact=True)
    common = sum(len({i for i, _ in one} & {i for i, _ in other}) for one, other in zip(found, exact, strict=True))
    return common / sum(map(len, exact))


def item_table(store: MemoryStore, policy_version: int) -> list[dict[str, Any]]:
    """Return the live behaviours and insights, the best supported first."""
    return store.query_rows(
        "SELECT 2 AS level, id, polarity AS kind, content AS text, support, status, usefulness,"
        f" ? - policy_version AS age_policy_steps FROM behaviours WHERE {LIVE}"
        " UNION ALL SELECT 1, id, kind, content, support, status, usefulness, ? - last_policy_version"
        f" FROM insights WHERE {LIVE} ORDER BY 1 DESC, 5 DESC, 2 LIMIT {TABLE_ROWS}",
        policy_version,
        policy_version,
    )


def _one(store: MemoryStore, sql: str, *values: object) -> float | None:
    found = store.query(sql, *values)[0][0]
    return float(found) if found is not None else None
