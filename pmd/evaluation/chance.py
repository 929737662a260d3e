"""What guessing scores: multiple-choice tasks enter; the scores of a uniform guesser leave, in the form of `Scores`."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from pmd.types import Task
from pmd.verifiers.mcq import listed_letters


def chance_scores(tasks: Sequence[Task], ks: Sequence[int]) -> dict[str, Any] | None:
    """Return the guesser's avg, pass@k and coverage@k, pooled and by domain; None unless all tasks list options."""
    options: dict[str, list[int]] = defaultdict(list)
    for task in tasks:
        options[task.domain].append(len(listed_letters(task)) if task.verifier == "mcq" else 0)
    counts = [count for part in options.values() for count in part]
    if not counts or min(counts) == 0:
        return None
    by_domain = {domain: _guess(part, ks) for domain, part in sorted(options.items())}
    return _guess(counts, ks) | {"by_domain": by_domain}


def _guess(counts: Sequence[int], ks: Sequence[int]) -> dict[str, Any]:
    """Score guesses among so many options per question: k guesses miss one option with chance (1 - 1/m)^k."""
    pass_at = {k: sum(1 - (1 - 1 / m) ** k for m in counts) / len(counts) for k in ks}
    coverage_at = {k: sum(m * (1 - (1 - 1 / m) ** k) for m in counts) / len(counts) for k in ks}
    return {"avg": sum(1 / m for m in counts) / len(counts), "pass_at": pass_at, "coverage_at": coverage_at}
