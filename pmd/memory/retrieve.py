"""Retrieves the memory items for a teacher's prompt, given the task's memory key. Read-only between updates.

The search finds neighbouring tasks; the candidates are the items of these tasks. Each kind has a quota, because lessons
are numerous and would crowd out the rest. Within a kind, a text is scored by the sum of the squared similarities of the
neighbours that have it, so near tasks count most and a text learned on several tasks scores higher. The usefulness
measured by audits raises or lowers the score.

With `memory.scope: own`, a task's experience and insights are read directly, and behaviours are ranked by the
similarity of their text to the task's key, as in the paper.
"""

import random
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from pmd.config.schema import MemoryConfig
from pmd.errors import AlignmentError
from pmd.memory.index import SIMILARITY_DECIMALS, TaskIndex
from pmd.memory.store import Behaviour, Experience, Insight, MemoryStore
from pmd.types import ItemKind, MemoryItem

SAME_TASK = 0.999  # a neighbour this similar is the query's own task, and is ignored in setting the floor
RELATIVE_FLOOR = 0.5  # share of the nearest other task's similarity; tasks below it share only common words
MAX_OWN_EXPERIENCES = 2  # one of them may be the success that the teacher is shown anyway
Hits = list[tuple[int, float]]  # task row and similarity, nearest first


class Retriever:
    """Retrieves items; call `refresh` after each update of the store."""

    def __init__(self, store: MemoryStore, index: TaskIndex, config: MemoryConfig):
        self._store = store
        self._index = index
        self._config = config
        self.refresh()

    @property
    def generation(self) -> int:
        """The generation of the memory that retrieval reads."""
        return self._items.generation

    def refresh(self) -> None:
        """Read the store's newest generation and refresh the index."""
        self._index.refresh()
        self._items = _read_live_items(self._store)

    def retrieve(self, task_key: str, *, seed: int, task_id: str | None = None) -> list[MemoryItem]:
        """Return at most k items for one task, in an order shuffled by the seed.

        Quotas are filled in order: behaviours, strategies and contrasts, experience, then lessons in the remaining
        places. With scope `own`, behaviours come last, in places that are kept for them.

        Args:
            task_id: id of the task; without scope `own` its own attempts are left out, because `past_success` returns
                them.

        Raises:
            AlignmentError: the store was written since the last `refresh`.
        """
        items, config = self._current_items(), self._config
        vector = self._store.embedder.embed_queries([task_key])
        own_row = items.task_rows.get(task_id or "")
        if config.scope == "own":
            hits: Hits = [(own_row, 1.0)] if own_row is not None else []
            floor = -1.0  # of behaviours: the nearest are taken, however near
        else:
            hits, floor = self._neighbours(self._index.search(vector, config.neighbours)[0], own_row)
        behaviours = self._behaviours(items, vector[0], hits, floor)
        strategies, lessons = self._insights(items, task_id, hits)
        max_experiences = config.k if set(config.levels) == {0} else MAX_OWN_EXPERIENCES if config.scope == "own" else 1
        quotas = [
            (behaviours, config.max_behaviours),
            (strategies, config.max_strategies),
            (self._experiences(items, task_id, hits), max_experiences),
            (lessons, config.k if config.max_lessons is None else config.max_lessons),
        ]
        kept_free = 0
        if config.scope == "own":  # a behaviour may repeat an insight, and only the insight says how many succeeded
            quotas = [*quotas[1:], quotas[0]]
            kept_free = len(behaviours.best(min(config.max_behaviours, config.k - 1), []))
        chosen: list[MemoryItem] = []
        for ranking, quota in quotas:
            room = config.k - len(chosen) - (kept_free if ranking is not behaviours else 0)
            chosen += ranking.best(min(quota, room), chosen)
        random.Random(seed).shuffle(chosen)
        return chosen

    def past_success(self, task_id: str, group_id: str = "") -> str | None:
        """Return the best verified success stored for this task, without its thinking, if there is one.

        Args:
            group_id: whose attempts are left out: a rollout's own success must not reach the teacher that scores it.
        """
        items = self._current_items()
        successes = items.successes.get(items.task_rows.get(task_id, -1), ())
        return next((success.response for success in successes if success.group_id != group_id), None)

    def insights(self, task_id: str) -> list[Insight]:
        """Return the insights of this task that may be retrieved."""
        items = self._current_items()
        return list(items.insights.get(items.task_rows.get(task_id, -1), ()))

    def _current_items(self) -> "_LiveItems":
        if self._store.generation != self._items.generation:
            raise AlignmentError(
                f"memory generation={self._store.generation} but retrieval reads {self._items.generation}: "
                "memory is read-only between updates; call Retriever.refresh() after an update."
            )
        return self._items

    def _neighbours(self, hits: Hits, own_row: int | None) -> tuple[Hits, float]:
        """Drop the hits below the similarity floor; return the others and the floor."""
        others = [similarity for task_row, similarity in hits if similarity < SAME_TASK and task_row != own_row]
        floor = max(self._config.min_similarity, RELATIVE_FLOOR * max(others, default=0.0))
        return [hit for hit in hits if hit[1] >= floor], floor

    def _insights(self, items: "_LiveItems", task_id: str | None, hits: Hits) -> tuple["_Ranking", "_Ranking"]:
        """Rank the neighbours' strategies and contrasts, and their lessons."""
        strategies, lessons = _Ranking(self._config), _Ranking(self._config)
        if 1 not in self._config.levels:
            return strategies, lessons
        scope, own_row = self._config.scope, items.task_rows.get(task_id or "")
        for task_row, similarity in hits:
            if scope == "neighbours" and task_row == own_row:
                continue
            for insight in items.insights.get(task_row, ()):
                if insight.kind in self._config.kinds:
                    ranking = lessons if insight.kind == "lesson" else strategies
                    kind = cast(ItemKind, insight.kind)
                    item = MemoryItem(
                        insight.id,
                        1,
                        kind,
                        insight.text,
                        task_row,
                        insight.task_id,
                        similarity,
                        num_successes=insight.num_successes,
                        num_attempts=insight.num_attempts,
                    )
                    ranking.add(item, similarity, insight.usefulness)
        return strategies, lessons

    def _behaviours(self, items: "_LiveItems", vector: np.ndarray, hits: Hits, floor: float) -> "_Ranking":
        """Rank behaviours by the neighbours among their tasks, and by the similarity of their own text to the query.

        With scope `own`, only the text counts.
        """
        ranking = _Ranking(self._config)
        if 2 not in self._config.levels or "behaviour" not in self._config.kinds or not items.behaviours:
            return ranking
        own = np.round((items.behaviour_vectors @ vector).astype(np.float64), SIMILARITY_DECIMALS)
        support: list[tuple[int, float]] = [
            (position, similarity)
            for task_row, similarity in (hits if self._config.scope != "own" else ())
            for position in items.behaviours_of.get(task_row, ())
        ]
        support += [(int(position), float(own[position])) for position in np.flatnonzero(own >= floor)]
        for position, similarity in support:
            behaviour = items.behaviours[position]
            item = MemoryItem(behaviour.id, 2, "behaviour", behaviour.text, None, None, float(own[position]))
            ranking.add(item, similarity, behaviour.usefulness)
        return ranking

    def _experiences(self, items: "_LiveItems", task_id: str | None, hits: Hits) -> "_Ranking":
        """Rank the best verified success of each neighbour, or with scope `own` the best ones of the query's task."""
        ranking, is_own = _Ranking(self._config), self._config.scope == "own"
        if 0 in self._config.levels and "experience" in self._config.kinds:
            for task_row, similarity in hits:
                for success in items.successes.get(task_row, ())[: MAX_OWN_EXPERIENCES if is_own else 1]:
                    if is_own or success.task_id != task_id:
                        text, row = success.response, success.task_row
                        ranking.add(
                            MemoryItem(success.id, 0, "experience", text, row, success.task_id, similarity), similarity
                        )
        return ranking


@dataclass(slots=True)
class _Candidate:
    item: MemoryItem
    support: float  # sum of the squared similarities of the neighbours that have the text
    usefulness: float | None


class _Ranking:
    """The candidate texts for one quota."""

    def __init__(self, config: MemoryConfig) -> None:
        self._config = config
        self._candidates: dict[str, _Candidate] = {}

    def add(self, item: MemoryItem, similarity: float, usefulness: float | None = None) -> None:
        """Add one more neighbour that has the text; the item of the first one, the nearest, is kept."""
        candidate = self._candidates.setdefault(item.text, _Candidate(item, 0.0, usefulness))
        candidate.support += max(similarity, 0.0) ** 2

    def best(self, quota: int, taken: list[MemoryItem]) -> list[MemoryItem]:
        """Return the best items up to the quota, with their scores, skipping texts in `taken`; ties by id."""
        texts = {item.text for item in taken}
        free = [replace(c.item, score=self._score(c)) for text, c in self._candidates.items() if text not in texts]
        return sorted(free, key=lambda item: (-item.score, item.item_id))[: max(0, quota)]

    def _score(self, candidate: _Candidate) -> float:
        """Return support, scaled by usefulness u: times 1 + weight * u / (|u| + margin)."""
        score = candidate.support
        if candidate.usefulness is not None:
            share = candidate.usefulness / (abs(candidate.usefulness) + self._config.audit_margin)
            score *= 1.0 + self._config.usefulness_weight * share
        return round(score, SIMILARITY_DECIMALS)


@dataclass(frozen=True, slots=True)
class _LiveItems:
    """The items of one generation that may be retrieved, by task."""

    generation: int
    task_rows: dict[str, int]  # task id -> task row
    insights: dict[int, list[Insight]]  # task row -> its insights
    successes: dict[int, list[Experience]]  # task row -> its verified successes, the best first
    behaviours: list[Behaviour]
    behaviour_vectors: np.ndarray  # [behaviours, D]
    behaviours_of: dict[int, list[int]]  # task row -> positions in `behaviours`


def _read_live_items(store: MemoryStore) -> _LiveItems:
    """Read the store's newest generation into plain dictionaries."""
    insights: dict[int, list[Insight]] = {}
    for insight in store.insights():
        insights.setdefault(insight.task_row, []).append(insight)
    successes: dict[int, list[Experience]] = {}
    for experience in sorted(store.experiences(), key=_merit, reverse=True):
        if experience.correct:
            successes.setdefault(experience.task_row, []).append(experience)
    behaviours = store.behaviours()
    behaviours_of: dict[int, list[int]] = {}
    for position, behaviour in enumerate(behaviours):
        for task_row in behaviour.task_rows:
            behaviours_of.setdefault(task_row, []).append(position)
    return _LiveItems(
        generation=store.generation,
        task_rows={task.task_id: task.id for task in store.tasks()},
        insights=insights,
        successes=successes,
        behaviours=behaviours,
        behaviour_vectors=store.vectors("behaviours")[1],
        behaviours_of=behaviours_of,
    )


def _merit(experience: Experience) -> tuple[float, int, int]:
    """Return the sort key of a success: reward, then policy version, then id; the highest is the best."""
    return experience.reward, experience.policy_version, experience.id
