"""What training cost: generated tokens, reflections included, and seconds of the processor or the GPU.

Methods that reflect generate more tokens than others from the same number of rollouts, so tables show both, and compare
methods at equal tokens too: at a common number of generated tokens, interpolated between evaluations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pmd.run_dir import GENERATED, GENERATED_SO_FAR

#: Seconds that are no part of training: evaluations, and the processor's clock, which covers everything.
NOT_TRAINING = ("time/cpu_s", "time/verification_s", "time/verification_cpu_s")
#: Seconds of prefetched rollouts that passed before training asked for them; other parts of the clock count them, too.
OVERLAP = "time/overlap_s"
SCORES = {"avg": "verify/avg", "with memory": "verify/memory_conditioned_avg"}


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run cost, without its evaluations."""

    tokens: float  # generated: rollouts, reflections and the texts of behaviours
    reflection_tokens: float  # of these, of reflections and behaviours
    seconds: float  # on a CPU those of the process, sandboxed programs not included; on a GPU those of the clock
    device: str  # `CPU` or `GPU`

    def __str__(self) -> str:
        share = f", {count(self.reflection_tokens)} of them reflections" if self.reflection_tokens else ""
        return f"{count(self.tokens)} tokens generated in training{share}; {self.seconds:,.0f} {self.device} seconds"


def cost_of(results: Mapping[str, Any]) -> Cost | None:
    """Return the cost of a trained run from its results.json; None if it was only evaluated."""
    totals = results.get("totals")
    if not totals:
        return None
    tokens = [totals.get(name, 0.0) for name in GENERATED]
    on_cpu = results.get("device", "cpu") == "cpu"
    processor = totals.get("time/cpu_s", 0.0) - totals.get("time/verification_cpu_s", 0.0)
    seconds = max(0.0, processor) if on_cpu else clock_seconds(totals)
    return Cost(sum(tokens), sum(tokens[1:]), seconds, "CPU" if on_cpu else "GPU")


def clock_seconds(totals: Mapping[str, float]) -> float:
    """Return the seconds that training took by the clock, from the seconds of its parts."""
    parts = (s for name, s in totals.items() if name.startswith("time/") and name not in (*NOT_TRAINING, OVERLAP))
    return sum(parts) - totals.get(OVERLAP, 0.0)


def scores_at(rows: Sequence[Mapping[str, str]], tokens: float) -> dict[str, float]:
    """Return the scores on the validation tasks that a run had when it had generated this many tokens.

    They are interpolated between the evaluations before and after; beyond the last evaluation they are its scores. Keys
    are columns of a table, and `tokens`, the number that the scores are for. Empty if the run was never evaluated. A
    row at an epoch's end counts that epoch's reflections.

    Args:
        rows: of metrics.csv, in order; the first evaluation is of the untrained policy, at 0 tokens.
    """
    counted = sorted((float(row["step"]), float(row[GENERATED_SO_FAR])) for row in rows if row.get(GENERATED_SO_FAR))
    before: dict[str, float] = {}
    for number, row in enumerate(rows):
        if not row.get(SCORES["avg"]):
            continue
        made = max((made for step, made in counted if step <= float(row["step"]) and number), default=0.0)
        found = {name: float(row[key]) for name, key in SCORES.items() if row.get(key)} | {"tokens": made}
        if made > tokens:
            part = (tokens - before["tokens"]) / (made - before["tokens"]) if before else 0.0
            return {name: before[name] + part * (found[name] - before[name]) for name in found if name in before}
        before = found
    return before


def count(number: float) -> str:
    """Return a number of tokens with a unit: 812, 45.3 k, 1.24 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"
