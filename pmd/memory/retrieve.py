"""A problem's key in; the procedures for its teacher prompt out. Read-only within an epoch.

The neighbours of a query are problems; their items follow. Each kind has its quota, because lessons are many and would
crowd out the rest. Within a kind, a text is ranked by the sum of the squared similarities of the neighbours that speak
for it: near problems count most, and a text learnt on several of them comes first. What audits found of a text's use
moves its rank (rank.py).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from pmd.config.schema import MemoryConfig
from pmd.errors import AlignmentError
from pmd.memory.embed import Embedder
from pmd.memory.index import SIMILARITY_DECIMALS, ProblemIndex
from pmd.memory.rank import Ranking
from pmd.memory.records import Insight
from pmd.memory.store import MemoryStore
from pmd.memory.view import View, build_view
from pmd.types import ItemKind, MemoryItem

SAME_PROBLEM = 0.999  # similarity from which a neighbour is the query's own problem, which sets no standard
RELATIVE_FLOOR = 0.5  # of the nearest other problem's similarity; below it only common words are shared
Hits = list[tuple[int, float]]  # problem id and similarity, nearest first


@dataclass(frozen=True, slots=True)
class Query:
    """What is looked up for one rollout group."""

    task_key: str
    seed: int  # of the order in which the items are returned
    task_id: str | None = None  # the task itself: its own attempts are left to `past_success`


class Retriever:
    """Looks procedures up; call `refresh` after each update of the store."""

    def __init__(self, store: MemoryStore, index: ProblemIndex, embedder: Embedder, config: MemoryConfig):
        self._store = store
        self._index = index
        self._embedder = embedder
        self._config = config
        self.refresh()

    @property
    def generation(self) -> int:
        """The generation of the memory that is read."""
        return self._view.generation

    def refresh(self) -> None:
        """Read the store's newest generation, and bring the index up to it."""
        self._index.refresh()
        self._view = build_view(self._store)

    def retrieve(self, task_key: str, *, seed: int, task_id: str | None = None) -> list[MemoryItem]:
        """Return at most k procedures for one problem."""
        return self.retrieve_many([Query(task_key, seed, task_id)])[0]

    def retrieve_many(self, queries: Sequence[Query]) -> list[list[MemoryItem]]:
        """Return at most k procedures for each query, in an order shuffled by its seed.

        Raises:
            AlignmentError: the store was written since the last `refresh`.
        """
        view = self._current_view()
        if not queries:
            return []
        vectors = self._embedder.embed([query.task_key for query in queries])
        found = self._index.search(vectors, self._config.neighbours)
        return [
            self._select(view, query, vector, hits) for query, vector, hits in zip(queries, vectors, found, strict=True)
        ]

    def past_success(self, task_id: str) -> str | None:
        """Return the best verified success stored for this very task, thinking stripped."""
        view = self._current_view()
        success = view.successes.get(view.problem_ids.get(task_id, -1))
        return success.response if success is not None else None

    def insights(self, task_id: str) -> list[Insight]:
        """Return the insights of this very task that may be retrieved, and its shadows."""
        problem_id = self._current_view().problem_ids.get(task_id, -1)
        return [*self._view.insights.get(problem_id, ()), *self._view.shadows.get(problem_id, ())]

    def shadows(self, task_id: str) -> list[Insight]:
        """Return the insights of this very task that are on probation."""
        return list(self._current_view().shadows.get(self._view.problem_ids.get(task_id, -1), ()))

    def _current_view(self) -> View:
        if self._store.generation != self._view.generation:
            raise AlignmentError(
                f"memory generation={self._store.generation} but retrieval reads {self._view.generation}: "
                "memory is read-only within an epoch; call Retriever.refresh() after MemoryStore.update()."
            )
        return self._view

    def _select(self, view: View, query: Query, vector: np.ndarray, hits: Hits) -> list[MemoryItem]:
        """Fill the quotas in order: behaviours, strategies and contrasts, experience, lessons with what is left."""
        config = self._config
        hits, floor = self._neighbours(hits)
        strategies, lessons = self._insights(view, query, hits)
        max_experiences = config.k if set(config.levels) == {0} else 1
        chosen: list[MemoryItem] = []
        draws = random.Random(f"{query.seed}/explore")
        for ranking, quota in (
            (self._behaviours(view, vector, hits, floor), config.max_behaviours),
            (strategies, config.max_strategies),
            (self._experiences(view, query, hits), max_experiences),
            (lessons, config.k if config.max_lessons is None else config.max_lessons),
        ):
            chosen += ranking.best(min(quota, config.k - len(chosen)), chosen, draws)
        random.Random(query.seed).shuffle(chosen)
        return chosen

    def _neighbours(self, hits: Hits) -> tuple[Hits, float]:
        """Keep the hits that are near enough; also return what near enough is."""
        others = [similarity for _, similarity in hits if similarity < SAME_PROBLEM]
        floor = max(self._config.min_similarity, RELATIVE_FLOOR * max(others, default=0.0))
        return [hit for hit in hits if hit[1] >= floor], floor

    def _insights(self, view: View, query: Query, hits: Hits) -> tuple[Ranking, Ranking]:
        strategies, lessons = Ranking(self._config), Ranking(self._config)
        if 1 not in self._config.levels:
            return strategies, lessons
        scope, own_id = self._config.scope, view.problem_ids.get(query.task_id or "")
        for problem_id, similarity in hits:
            if scope != "both" and (problem_id == own_id) != (scope == "own"):
                continue
            for insight in view.insights.get(problem_id, ()):
                if insight.kind in self._config.kinds:
                    ranking = lessons if insight.kind == "lesson" else strategies
                    kind = cast(ItemKind, insight.kind)
                    procedure = MemoryItem(insight.id, 1, kind, insight.text, problem_id, insight.task_id, similarity)
                    ranking.add(procedure, similarity, insight.usefulness)
        return strategies, lessons

    def _behaviours(self, view: View, vector: np.ndarray, hits: Hits, floor: float) -> Ranking:
        """Rank behaviours by the neighbours among their problems, and by their own text's similarity."""
        ranking = Ranking(self._config)
        if 2 not in self._config.levels or "behaviour" not in self._config.kinds or not view.behaviours:
            return ranking
        own = np.round((view.behaviour_vectors @ vector).astype(np.float64), SIMILARITY_DECIMALS)
        support: list[tuple[int, float]] = [
            (position, similarity)
            for problem_id, similarity in hits
            for position in view.behaviours_of.get(problem_id, ())
        ]
        support += [(int(position), float(own[position])) for position in np.flatnonzero(own >= floor)]
        for position, similarity in support:
            behaviour = view.behaviours[position]
            procedure = MemoryItem(behaviour.id, 2, "behaviour", behaviour.text, None, None, float(own[position]))
            ranking.add(procedure, similarity, behaviour.usefulness)
        return ranking

    def _experiences(self, view: View, query: Query, hits: Hits) -> Ranking:
        """Rank the best verified success of each neighbour but the query's own problem."""
        ranking = Ranking(self._config)
        if 0 in self._config.levels and "experience" in self._config.kinds:
            for problem_id, similarity in hits:
                success = view.successes.get(problem_id)
                if success is not None and success.task_id != query.task_id:
                    procedure = MemoryItem(
                        success.id, 0, "experience", success.response, problem_id, success.task_id, similarity
                    )
                    ranking.add(procedure, similarity)
        return ranking
