"""Insights of several problems that say the same: clusters in, for the policy to put into words as behaviours.

Average-link agglomeration of the distinct texts, strategies and contrasts apart from lessons, at the cosine threshold
`memory.cluster_similarity`. The texts are compared by an embedder fitted to them, because words that tell problems
apart are not those that tell insights apart. A cluster needs `memory.cluster_support` problems behind it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from pmd.config.schema import MemoryConfig
from pmd.memory.records import Behaviour, Insight
from pmd.memory.store import MemoryStore
from pmd.memory.write_behaviours import BehaviourDraft

MAX_CLUSTERED_TEXTS = 4_000  # the cost is quadratic; further texts join the nearest cluster
MAX_LESSONS = 3


@dataclass(frozen=True, slots=True)
class Cluster:
    """Insights of one polarity that lie close together."""

    polarity: str
    insights: tuple[Insight, ...]  # one for each distinct text, the text of most problems first
    lessons: tuple[Insight, ...]  # `do` clusters: the nearest lessons of the same problems, distinct, at most 3
    member_ids: tuple[int, ...]  # all insights with these texts
    problem_ids: tuple[int, ...]
    evidence_sha: str  # of the texts above
    behaviour: Behaviour | None = None  # the active behaviour that it continues

    @property
    def changed(self) -> bool:
        """Whether there is something to abstract: it is new, or its texts are others than last time."""
        return self.behaviour is None or self.behaviour.evidence_sha != self.evidence_sha

    @property
    def texts(self) -> list[str]:
        """What there is to abstract: its own texts, then the lessons."""
        return [insight.text for insight in (*self.insights, *self.lessons)]

    def draft(self, text: str | None) -> BehaviourDraft:
        """Return what `Writer.replace_behaviours` takes; None keeps the text of the behaviour it continues."""
        return BehaviourDraft(self.polarity, self.member_ids, self.evidence_sha, text)


@dataclass(frozen=True, slots=True)
class _Text:
    """One distinct text with all active insights that say it."""

    insights: tuple[Insight, ...]
    problem_ids: frozenset[int]

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: the text of most problems first, then the oldest."""
        return -len(self.problem_ids), self.insights[0].id


def find_clusters(
    store: MemoryStore, config: MemoryConfig, polarities: Sequence[Literal["do", "avoid"]] = ("do",)
) -> list[Cluster]:
    """Return the clusters of the active insights, `do` before `avoid`, the best supported first."""
    insights = store.insights()
    lessons = _distinct([insight for insight in insights if insight.polarity == "avoid"])
    strategies = _distinct([insight for insight in insights if insight.polarity == "do"])
    vectors = _text_vectors(store, [*strategies, *lessons])
    do_vectors, avoid_vectors = vectors[: len(strategies)], vectors[len(strategies) :]
    lessons_of: dict[int, list[int]] = {}  # problem id -> rows
    for row, text in enumerate(lessons):
        for problem_id in text.problem_ids:
            lessons_of.setdefault(problem_id, []).append(row)
    found: list[Cluster] = []
    for polarity, texts, own_vectors in (("do", strategies, do_vectors), ("avoid", lessons, avoid_vectors)):
        if polarity not in polarities:
            continue
        for positions in _agglomerate(own_vectors, config.cluster_similarity):
            members = [texts[position] for position in positions]
            problem_ids = set().union(*(text.problem_ids for text in members))
            if len(problem_ids) < config.cluster_support:
                continue
            near: list[Insight] = []
            if polarity == "do":
                rows = sorted({row for problem_id in problem_ids for row in lessons_of.get(problem_id, ())})
                nearest = _nearest(own_vectors[positions].mean(0), avoid_vectors[rows])
                near = [lessons[rows[position]].insights[0] for position in nearest]
            found.append(_cluster(polarity, members, near, problem_ids))
    return _continue_behaviours(store, found)


def _distinct(insights: list[Insight]) -> list[_Text]:
    by_text: dict[tuple[str, str], list[Insight]] = {}
    for insight in insights:
        by_text.setdefault((insight.kind, insight.text), []).append(insight)
    texts = [_Text(tuple(group), frozenset(i.problem_id for i in group)) for group in by_text.values()]
    return sorted(texts, key=lambda text: text.order)


def _text_vectors(store: MemoryStore, texts: list[_Text]) -> np.ndarray:
    """Embed the distinct texts for comparison with each other; stored vectors serve where the embedder is fixed."""
    words = [text.insights[0].text for text in texts]
    embedder = store.embedder.fitted_to(words)
    if not embedder.costly:
        return embedder.embed(words)
    ids, vectors = store.vectors("insights")
    rows = np.searchsorted(ids, [text.insights[0].id for text in texts])
    return vectors[rows]


def _agglomerate(vectors: np.ndarray, similarity: float) -> list[list[int]]:
    """Group rows whose average cosine similarity is at least the threshold; groups by their first row."""
    head = vectors[:MAX_CLUSTERED_TEXTS]
    if len(head) == 0:
        return []
    labels = np.ones(1, dtype=np.int64)
    if len(head) > 1:
        distances = np.clip(1.0 - np.round(head @ head.T, 5), 0.0, 2.0).astype(np.float64)
        np.fill_diagonal(distances, 0.0)
        tree = linkage(squareform(distances, checks=False), method="average")
        labels = fcluster(tree, t=1.0 - similarity, criterion="distance")
    groups: dict[int, list[int]] = {}
    for row, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(row)
    ordered = sorted(groups.values())
    if len(vectors) > len(head):
        centres = np.stack([head[group].mean(0) for group in ordered])
        for start in range(len(head), len(vectors), MAX_CLUSTERED_TEXTS):
            nearness = vectors[start : start + MAX_CLUSTERED_TEXTS] @ centres.T  # average similarity to the members
            for row, best in enumerate(nearness.argmax(1).tolist()):
                if nearness[row, best] >= similarity:
                    ordered[best].append(start + row)
    return ordered


def _nearest(centre: np.ndarray, vectors: np.ndarray) -> list[int]:
    """Return the rows nearest to the centre, at most `MAX_LESSONS`."""
    return np.argsort(-np.round(vectors @ centre, 5), kind="stable")[:MAX_LESSONS].tolist()


def _cluster(polarity: str, members: list[_Text], lessons: list[Insight], problem_ids: set[int]) -> Cluster:
    insights = tuple(text.insights[0] for text in sorted(members, key=lambda text: text.order))
    evidence = sorted(f"{insight.kind}\0{insight.text}" for insight in [*insights, *lessons])
    return Cluster(
        polarity=polarity,
        insights=insights,
        lessons=tuple(lessons),
        member_ids=tuple(sorted(insight.id for text in members for insight in text.insights)),
        problem_ids=tuple(sorted(problem_ids)),
        evidence_sha=hashlib.sha256("\n".join(evidence).encode()).hexdigest()[:16],
    )


def _continue_behaviours(store: MemoryStore, found: list[Cluster]) -> list[Cluster]:
    found = sorted(found, key=lambda c: (c.polarity != "do", -len(c.problem_ids), c.member_ids))
    matches = store.match_behaviours([(c.polarity, c.member_ids) for c in found])
    return [
        Cluster(
            c.polarity, c.insights, c.lessons, c.member_ids, c.problem_ids, c.evidence_sha,
            matches.get(n),
        )
        for n, c in enumerate(found)
    ]  # fmt: skip
