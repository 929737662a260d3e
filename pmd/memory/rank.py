"""Texts of one kind compete for the places of a query: by the neighbours that speak for them, what audits found, and
how little they repeat of what is chosen already. Some places may go to a text drawn at random.

Enters: procedures with the similarity of the neighbour that each came with. Leaves: the chosen ones, each with its
score and the probability with which it was chosen for its place.
"""

import random
from dataclasses import dataclass, replace

from pmd.config.schema import MemoryConfig
from pmd.memory.embed import words_of
from pmd.memory.index import SIMILARITY_DECIMALS
from pmd.types import MemoryItem


@dataclass(slots=True)
class _Candidate:
    procedure: MemoryItem
    support: float  # sum of the squared similarities of the neighbours that speak for the text
    usefulness: float | None


class Ranking:
    """Texts of one kind or more, each with the neighbours' support for it."""

    def __init__(self, config: MemoryConfig) -> None:
        self._config = config
        self._candidates: dict[str, _Candidate] = {}

    def add(self, procedure: MemoryItem, similarity: float, usefulness: float | None = None) -> None:
        """Count one more neighbour that speaks for a text; the nearest one's procedure stands for it."""
        candidate = self._candidates.setdefault(procedure.text, _Candidate(procedure, 0.0, usefulness))
        candidate.support += max(similarity, 0.0) ** 2

    def best(self, quota: int, taken: list[MemoryItem], draws: random.Random) -> list[MemoryItem]:
        """Return the quota's best whose text is not taken; ties by id."""
        texts = {procedure.text for procedure in taken}
        free = [candidate for text, candidate in self._candidates.items() if text not in texts]
        free.sort(key=lambda c: (-self._score(c, []), c.procedure.item_id))
        chosen: list[MemoryItem] = []
        while free and len(chosen) < quota:
            if self._config.diversity:
                free.sort(key=lambda c: (-self._score(c, [*taken, *chosen]), c.procedure.item_id))
            position, explored = 0, self._config.exploration
            if explored and draws.random() < explored:
                position = draws.randrange(len(free))
            propensity = explored / len(free) + (1.0 - explored) * (position == 0)
            candidate = free.pop(position)
            score = self._score(candidate, [*taken, *chosen])
            chosen.append(replace(candidate.procedure, score=score, propensity=propensity))
        return chosen

    def _score(self, candidate: _Candidate, chosen: list[MemoryItem]) -> float:
        """Return support, moved by usefulness u up to the factor 1 +- weight as u / (|u| + margin), less repetition."""
        config, score = self._config, candidate.support
        if candidate.usefulness is not None:
            share = candidate.usefulness / (abs(candidate.usefulness) + config.audit_margin)
            score *= 1.0 + config.usefulness_weight * share
        if config.diversity and chosen:
            score *= 1.0 - config.diversity * max(_overlap(candidate.procedure.text, p.text) for p in chosen)
        return round(score, SIMILARITY_DECIMALS)


def _overlap(one: str, other: str) -> float:
    """Return the Jaccard similarity of the two texts' words."""
    first, second = set(words_of(one)), set(words_of(other))
    return len(first & second) / max(1, len(first | second))
