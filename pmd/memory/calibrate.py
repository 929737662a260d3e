"""Similarity thresholds in an embedder's own scale, measured on the insights themselves (our choice).

Two insights on one subject have a cosine of .09 on average under the hashing embedder, and of .37 under a small
sentence model (tests/memory/data/prose_insights.json), so no fixed threshold serves both. Two quantities place the
scale: the background, which is the median similarity of any two insights, and the near, which is the median similarity
of an insight to its nearest neighbour.

- Clusters form half-way between background and near, but at least two standard deviations above the background, so that
  unrelated insights stay apart; and never above the near, so that half of the insights can find a neighbour. The
  deviation is that of the lower half of all pairs: the upper half holds the related ones.
- Insights of one task merge half-way between identity and what only one nearest neighbour in ten exceeds.

Compared are distinct texts of different tasks. The same texts give the same thresholds: the sample is seeded and the
result rounded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

MIN_TEXTS = 12  # with fewer, thresholds that suit a sentence model are used
CLUSTER, MERGE = 0.6, 0.92
MAX_TEXTS = 512  # compared; more would cost time and change little
DEVIATIONS = 2.0
DECIMALS = 4  # matrix products differ in the last bits from machine to machine


@dataclass(frozen=True, slots=True)
class Similarities:
    """The thresholds for one embedder and one memory, as cosine similarities."""

    cluster: float
    merge: float


def choose_texts(count: int) -> list[int]:
    """Return the positions of the texts to compare, at most `MAX_TEXTS`, in order."""
    return sorted(Random(0).sample(range(count), min(count, MAX_TEXTS)))


def calibrate(vectors: np.ndarray, task_rows: Sequence[int]) -> Similarities:
    """Return the thresholds for texts with these unit vectors [n, D], each of one task."""
    tasks = np.asarray(task_rows)
    comparable = tasks[:, None] != tasks[None, :]
    has_neighbour = comparable.any(1)
    if has_neighbour.sum() < MIN_TEXTS:
        return Similarities(CLUSTER, MERGE)
    alike = (vectors @ vectors.T).astype(np.float64)
    pairs = alike[np.triu(comparable, 1)]
    nearest = np.where(comparable, alike, -1.0).max(1)[has_neighbour]
    low, background = np.quantile(pairs, [0.16, 0.5])  # a normal distribution has 16 % below mean - deviation
    near, nearer = np.quantile(nearest, [0.5, 0.9])
    above_chance = background + DEVIATIONS * (background - low)
    cluster = min(near, max((background + near) / 2, above_chance))
    return Similarities(round(float(cluster), DECIMALS), round(float((1.0 + nearer) / 2), DECIMALS))
