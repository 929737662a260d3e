"""Rows of the store as frozen records, and the statements that read them."""

import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

#: Statuses of items that retrieval may return; an absorbed item stays one: a frozen teacher knows it only from memory.
LIVE = "status IN ('active', 'absorbed')"
#: Table of each level.
TABLES = {0: "experiences", 1: "insights", 2: "behaviours"}


@dataclass(frozen=True, slots=True)
class Problem:
    """A training problem."""

    id: int
    task_id: str
    domain: str
    memory_key: str
    question: str


@dataclass(frozen=True, slots=True)
class Experience:
    """Level 0: one attempt at a problem, thinking stripped."""

    id: int
    problem_id: int
    task_id: str
    rollout_id: str
    policy_version: int
    response: str
    reward: float
    correct: int  # 0 or 1
    feedback: str
    support: int
    status: str


@dataclass(frozen=True, slots=True)
class Insight:
    """Level 1: what one problem's attempts teach."""

    id: int
    problem_id: int
    task_id: str
    kind: str
    text: str
    policy_version: int
    support: int
    leak: str
    status: str
    usefulness: float | None = None  # nats per token, from audits

    @property
    def polarity(self) -> str:
        """`avoid` for lessons, `do` for strategies and contrasts."""
        return "avoid" if self.kind == "lesson" else "do"


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Level 2: what insights of several problems have in common."""

    id: int
    polarity: str
    text: str
    support: int
    evidence_sha: str
    policy_version: int
    version: int
    status: str
    usefulness: float | None
    member_ids: tuple[int, ...]  # insights
    problem_ids: tuple[int, ...]


def vector_blob(vector: np.ndarray) -> bytes:
    """Return one vector as the store keeps it: float32, little endian."""
    return vector.astype("<f4").tobytes()


def blobs_to_matrix(blobs: Iterable[bytes], dimension: int) -> np.ndarray:
    """Return the stored vectors as float32 [n, D]."""
    return np.frombuffer(b"".join(blobs), dtype="<f4").reshape(-1, dimension).astype(np.float32, copy=False)


def read_problems(db: sqlite3.Connection) -> list[Problem]:
    """Return all problems in id order."""
    rows = db.execute("SELECT id, task_id, domain, memory_key, question FROM problems ORDER BY id")
    return [Problem(*row) for row in rows]


def _has_status(status: str | None) -> str:
    """Return the condition for one status, `live` ones, or (None) any."""
    return {None: "TRUE", "live": LIVE}.get(status, f"status = '{status}'")


def read_experiences(db: sqlite3.Connection, status: str | None = "live") -> list[Experience]:
    """Return the experiences of one status (None: all) in id order."""
    rows = db.execute(
        "SELECT e.id, problem_id, task_id, rollout_id, policy_version, response, reward, correct, feedback, support,"
        f" status FROM experiences e JOIN problems p ON p.id = problem_id WHERE {_has_status(status)} ORDER BY e.id"
    )
    return [Experience(*row) for row in rows]


def read_insights(db: sqlite3.Connection, status: str | None = "live") -> list[Insight]:
    """Return the insights of one status (None: all) in id order."""
    rows = db.execute(
        "SELECT i.id, problem_id, task_id, kind, content, policy_version, support, leak, status, usefulness"
        f" FROM insights i JOIN problems p ON p.id = problem_id WHERE {_has_status(status)} ORDER BY i.id"
    )
    return [Insight(*row) for row in rows]


def read_behaviours(db: sqlite3.Connection, status: str | None = "live") -> list[Behaviour]:
    """Return the behaviours of one status (None: all) with their members, in id order."""
    members: dict[int, list[int]] = {}
    problems: dict[int, set[int]] = {}
    for behaviour_id, insight_id, problem_id in db.execute(
        "SELECT child_id, parent_id, problem_id FROM links JOIN insights i ON i.id = parent_id"
        " WHERE child_level = 2 AND parent_level = 1 ORDER BY child_id, parent_id"
    ):
        members.setdefault(behaviour_id, []).append(insight_id)
        problems.setdefault(behaviour_id, set()).add(problem_id)
    rows = db.execute(
        "SELECT id, polarity, content, support, evidence_sha, policy_version, version, status, usefulness"
        f" FROM behaviours WHERE {_has_status(status)} ORDER BY id"
    )
    return [
        Behaviour(*row, member_ids=tuple(members.get(row[0], ())), problem_ids=tuple(sorted(problems.get(row[0], ()))))
        for row in rows
    ]


def read_vectors(db: sqlite3.Connection, table: str, dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids [n] and vectors [n, D] of a table in id order; for items, the live ones."""
    where = " WHERE embedding IS NOT NULL" if table == "problems" else f" WHERE {LIVE}"
    rows = db.execute(f"SELECT id, embedding FROM {table}{where} ORDER BY id").fetchall()
    ids = np.array([row[0] for row in rows], dtype=np.int64)
    return ids, blobs_to_matrix((row[1] for row in rows), dimension)
