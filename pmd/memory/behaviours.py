"""Behaviours: clusters of similar insights from several tasks, summarised by the policy. Ids are stable.

Distinct strategies and contrasts are clustered with average linkage at the cosine threshold
`memory.cluster_similarity`, or one measured on them (`calibrate.py`). They are compared by an embedder fitted to them,
because the words that distinguish tasks are not the ones that distinguish insights. A cluster needs insights from at
least `memory.cluster_support` tasks, and also gets the nearest lessons of these tasks.

With `memory.cluster_over: tasks`, the tasks are clustered instead, by their memory keys, and the strategies and
contrasts of a cluster's tasks are summarised, as in the paper.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from pmd.config.schema import MemoryConfig
from pmd.memory.calibrate import MIN_TEXTS, calibrate, choose_texts
from pmd.memory.store import Behaviour, Insight, Ledger, MemoryStore

MAX_CLUSTERED_TEXTS = 4_000  # the cost is quadratic; texts beyond this number join the nearest cluster
MAX_LESSONS = 3
MAX_BEHAVIOURS = 256
SAME_BEHAVIOUR = 0.5  # minimum Jaccard similarity of their texts for a cluster to continue a behaviour


@dataclass(frozen=True, slots=True)
class BehaviourChange:
    """The result for one cluster. Without a text (abstraction failed), the behaviour it continues keeps its text."""

    member_ids: tuple[int, ...]  # insights
    evidence_sha: str  # of the texts it was abstracted from
    text: str | None
    continues: int | None  # id of the active behaviour whose next version it is


@dataclass(frozen=True, slots=True)
class Cluster:
    """Similar strategies and contrasts, with lessons of the same tasks."""

    insights: tuple[Insight, ...]  # one for each distinct text, those of most tasks first
    lessons: tuple[Insight, ...]  # the nearest lessons of the same tasks, distinct, at most `MAX_LESSONS`
    member_ids: tuple[int, ...]  # all insights with the texts of `insights`
    task_rows: tuple[int, ...]
    evidence_sha: str  # of the texts above
    behaviour: Behaviour | None = None  # the active behaviour that it continues

    @property
    def needs_text(self) -> bool:
        """Whether the cluster needs a new text: it is new, or its texts have changed."""
        return self.behaviour is None or self.behaviour.evidence_sha != self.evidence_sha

    @property
    def texts(self) -> list[str]:
        """The texts to abstract: its own, then the lessons."""
        return [insight.text for insight in (*self.insights, *self.lessons)]

    def change(self, text: str | None) -> BehaviourChange:
        """Return the change for `Writer.replace_behaviours`; None keeps the text of the behaviour it continues."""
        continues = self.behaviour.id if self.behaviour is not None else None
        return BehaviourChange(self.member_ids, self.evidence_sha, text, continues)


@dataclass(frozen=True, slots=True)
class _Text:
    """One distinct text, with all active insights that have it."""

    insights: tuple[Insight, ...]
    task_rows: frozenset[int]

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: texts of most tasks first, then the oldest."""
        return -len(self.task_rows), self.insights[0].id

    def within(self, task_rows: frozenset[int]) -> "_Text":
        """Return the text as some tasks have it."""
        own = tuple(insight for insight in self.insights if insight.task_row in task_rows)
        return _Text(own, self.task_rows & task_rows)


def find_clusters(store: MemoryStore, config: MemoryConfig) -> tuple[list[Cluster], float | None]:
    """Return the clusters of the active insights, the best supported first, each with the behaviour it continues.

    Also returns the similarity from which insights formed one; None if there was nothing to cluster.
    """
    insights = store.insights()
    if len({insight.task_row for insight in insights}) < config.cluster_support:
        return [], None
    lessons = _distinct([insight for insight in insights if insight.kind == "lesson"])
    strategies = _distinct([insight for insight in insights if insight.kind != "lesson"])
    vectors = _text_vectors(store, [*strategies, *lessons])
    vectors, lesson_vectors = vectors[: len(strategies)], vectors[len(strategies) :]
    lessons_of: dict[int, list[int]] = {}  # task row -> positions in `lessons`
    for position, text in enumerate(lessons):
        for task_row in text.task_rows:
            lessons_of.setdefault(task_row, []).append(position)
    found: list[Cluster] = []
    if config.cluster_over == "insights":
        similarity = config.cluster_similarity or _calibrated(
            vectors, [text.insights[0].task_row for text in strategies]
        )
        groups = _similar_texts(strategies, vectors, similarity)
    else:
        rows, keys = _task_vectors(store, strategies)
        similarity = config.cluster_similarity or _calibrated(keys, rows)
        groups = _texts_of_similar_tasks(strategies, vectors, rows, keys, similarity)
    for members, centre in groups:
        task_rows = set().union(*(text.task_rows for text in members))
        if len(task_rows) < config.cluster_support:
            continue
        rows = sorted({row for task_row in task_rows for row in lessons_of.get(task_row, ())})
        nearest = _nearest(centre, lesson_vectors[rows])
        found.append(_cluster(members, [lessons[rows[position]].insights[0] for position in nearest], task_rows))
    found.sort(key=lambda cluster: (-len(cluster.task_rows), cluster.member_ids))
    behaviours = _match(store, found)
    return [replace(cluster, behaviour=behaviours.get(n)) for n, cluster in enumerate(found)], similarity


def describe_absence(store: MemoryStore, config: MemoryConfig, num_malformed: int) -> str:
    """Return why there is no insight, or no behaviour although there should be one; empty otherwise.

    Args:
        num_malformed: clusters of the latest update that were not put into words.
    """
    stats = store.stats()
    num_insights, num_leaks = (int(stats[name]) for name in ("insights", "insights_quarantined"))
    if num_insights == 0 and num_leaks > 0:
        return f"memory: no insight is in use; {num_leaks} are quarantined because they give away an answer."
    wanted = 2 in config.levels and "behaviour" in config.kinds and config.max_behaviours > 0
    if not wanted or store.behaviours():
        return ""
    if num_malformed:
        return (
            f"memory: no behaviour; none of {num_malformed} clusters of insights could be put into words: their writer "
            "failed, or does not keep to the form asked for (reflection.behaviour_writer can name another)."
        )
    strategies = _distinct([insight for insight in store.insights() if insight.kind != "lesson"])
    num_tasks = len(set[int]().union(*(text.task_rows for text in strategies)))
    was_sought = "cluster_similarity" in stats
    if not was_sought or len(strategies) < MIN_TEXTS or num_tasks < config.cluster_support:
        return ""
    return (
        f"memory: no behaviour; of {len(strategies)} insights on {num_tasks} tasks, no cluster rests on "
        f"{config.cluster_support} tasks at a similarity of {stats.get('cluster_similarity', 0.0):.2f}. Set "
        "memory.cluster_similarity=null to measure it, lower memory.cluster_support, or use a sentence model as "
        "memory.embedder."
    )


#: Texts that belong together, and the mean of their vectors.
_Group = tuple[list[_Text], np.ndarray]


def _similar_texts(texts: Sequence[_Text], vectors: np.ndarray, similarity: float) -> Iterator[_Group]:
    """Yield groups of similar texts."""
    for positions in _agglomerate(vectors, similarity):
        yield [texts[position] for position in positions], vectors[positions].mean(0)


def _task_vectors(store: MemoryStore, texts: Sequence[_Text]) -> tuple[list[int], np.ndarray]:
    """Return the rows of the tasks that have texts, and the vectors of their memory keys."""
    rows = sorted(set[int]().union(*(text.task_rows for text in texts)))
    ids, vectors = store.vectors("tasks")
    return rows, vectors[np.searchsorted(ids, rows)]


def _texts_of_similar_tasks(
    texts: Sequence[_Text], vectors: np.ndarray, task_rows: Sequence[int], keys: np.ndarray, similarity: float
) -> Iterator[_Group]:
    """Yield the texts of each group of similar tasks; a text of tasks in several groups is in each of them."""
    for members in _agglomerate(keys, similarity):
        rows = frozenset(task_rows[position] for position in members)
        positions = [position for position, text in enumerate(texts) if text.task_rows & rows]
        yield [texts[position].within(rows) for position in positions], vectors[positions].mean(0)


def replace_behaviours(
    ledger: Ledger, old: Sequence[Behaviour], changes: Sequence[BehaviourChange], policy_version: int
) -> list[int | None]:
    """Apply the changes and retire the other behaviours of `old`; return the ids, None for changes left out."""
    support = [_count_tasks(ledger, change.member_ids) for change in changes]
    usable = [n for n, change in enumerate(changes) if change.text or change.continues is not None]
    kept = set(sorted(usable, key=lambda n: (-support[n], n))[:MAX_BEHAVIOURS])
    ids: list[int | None] = []
    for n, change in enumerate(changes):
        if n not in kept:
            ids.append(None)
        elif change.continues is not None:
            _write_next_version(ledger, change.continues, change, support[n], policy_version)
            ids.append(change.continues)
        else:
            values = {"content": change.text, "support": support[n], "evidence_sha": change.evidence_sha}
            ids.append(ledger.add(2, values | {"policy_version": policy_version}, "abstraction", change.member_ids))
    for behaviour in old:
        if behaviour.id not in ids:
            ledger.change(2, behaviour.id, {"status": "retired"}, "no cluster continues it")
    return ids


def _write_next_version(
    ledger: Ledger, behaviour_id: int, change: BehaviourChange, support: int, policy_version: int
) -> None:
    values: dict[str, object] = {"support": support}
    text, version = ledger.db.execute(
        "SELECT content, version FROM behaviours WHERE id = ?", (behaviour_id,)
    ).fetchone()
    if change.text:
        values["evidence_sha"] = change.evidence_sha
        if change.text != text:
            values |= {"content": change.text, "policy_version": policy_version}
            values |= {"version": version + 1, "embedding": None}
    ledger.change(2, behaviour_id, values, "abstraction", change.member_ids)


def _count_tasks(ledger: Ledger, insight_ids: Sequence[int]) -> int:
    marks = ", ".join("?" * len(insight_ids))
    return ledger.db.execute(
        f"SELECT count(DISTINCT task_row) FROM insights WHERE id IN ({marks})", tuple(insight_ids)
    ).fetchone()[0]


def _match(store: MemoryStore, clusters: Sequence[Cluster]) -> dict[int, Behaviour]:
    """Pair clusters with the active behaviours they continue, most similar first, each at most once; by position.

    Similarity is the share of common texts, so the same insight learned on one more task does not make a new behaviour.
    Pairs that share less than half of their texts are ignored.
    """
    text_of = dict(store.query("SELECT id, kind || ':' || content FROM insights"))
    behaviours = {behaviour.id: behaviour for behaviour in store.behaviours()}
    old_texts = {b.id: {text_of[member] for member in b.member_ids} for b in behaviours.values()}
    owners: dict[str, list[int]] = {}
    for behaviour_id, texts in old_texts.items():
        for text in texts:
            owners.setdefault(text, []).append(behaviour_id)
    pairs: list[tuple[float, int, int]] = []
    for position, cluster in enumerate(clusters):
        own = {text_of[member] for member in cluster.member_ids}
        for behaviour_id in {owner for text in own for owner in owners.get(text, ())}:
            other = old_texts[behaviour_id]
            pairs.append((-len(own & other) / len(own | other), behaviour_id, position))
    matched: dict[int, Behaviour] = {}
    taken: set[int] = set()
    for negative_overlap, behaviour_id, position in sorted(pairs):
        if -negative_overlap >= SAME_BEHAVIOUR and position not in matched and behaviour_id not in taken:
            matched[position] = behaviours[behaviour_id]
            taken.add(behaviour_id)
    return matched


def _distinct(insights: list[Insight]) -> list[_Text]:
    by_text: dict[tuple[str, str], list[Insight]] = {}
    for insight in insights:
        by_text.setdefault((insight.kind, insight.text), []).append(insight)
    texts = [_Text(tuple(group), frozenset(i.task_row for i in group)) for group in by_text.values()]
    return sorted(texts, key=lambda text: text.order)


def _text_vectors(store: MemoryStore, texts: list[_Text]) -> np.ndarray:
    """Embed the distinct texts to compare them with each other; stored vectors are used if the embedder is costly."""
    words = [text.insights[0].text for text in texts]
    embedder = store.embedder.fitted_to(words)
    if not embedder.costly:
        return embedder.embed(words)
    ids, vectors = store.vectors("insights")
    rows = np.searchsorted(ids, [text.insights[0].id for text in texts])
    return vectors[rows]


def _calibrated(vectors: np.ndarray, task_rows: Sequence[int]) -> float:
    chosen = choose_texts(len(task_rows))
    return calibrate(vectors[chosen], [task_rows[position] for position in chosen]).cluster


def _agglomerate(vectors: np.ndarray, similarity: float) -> list[list[int]]:
    """Group rows whose average cosine similarity is at least the threshold; groups are sorted by their first row."""
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


def _cluster(members: list[_Text], lessons: list[Insight], task_rows: set[int]) -> Cluster:
    insights = tuple(text.insights[0] for text in sorted(members, key=lambda text: text.order))
    evidence = sorted(f"{insight.kind}\0{insight.text}" for insight in [*insights, *lessons])
    return Cluster(
        insights=insights,
        lessons=tuple(lessons),
        member_ids=tuple(sorted(insight.id for text in members for insight in text.insights)),
        task_rows=tuple(sorted(task_rows)),
        evidence_sha=hashlib.sha256("\n".join(evidence).encode()).hexdigest()[:16],
    )
