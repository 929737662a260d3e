"""Differences between the arms of a sweep, paired by seed.

Runs of one seed share their world, its tasks and the order of both, so their differences vary less than their scores.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """A mean difference over the seeds that both arms finished, and its interval (Student's t; nan for one seed)."""

    mean: float
    half_width: float  # of the 95 % interval
    num_seeds: int

    def __str__(self) -> str:
        width = "" if math.isnan(self.half_width) else f" ± {100 * self.half_width:.1f}"
        return f"{100 * self.mean:+.1f}{width}"


def paired_difference(own: Mapping[int, float], reference: Mapping[int, float]) -> PairedDifference | None:
    """Return own minus reference, both by seed; None if they have no seed in common."""
    differences = [own[seed] - reference[seed] for seed in own if seed in reference]
    if not differences:
        return None
    num_seeds, mean = len(differences), sum(differences) / len(differences)
    if num_seeds < 2:
        return PairedDifference(mean, math.nan, num_seeds)
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (num_seeds - 1) / num_seeds)
    return PairedDifference(mean, float(stdtrit(num_seeds - 1, (1 + CONFIDENCE) / 2)) * error, num_seeds)
