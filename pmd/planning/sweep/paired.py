"""Differences between the arms of a sweep, paired by seed.

Runs of one seed share their world, its tasks and the order of both, so their differences vary less than their scores.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.special import stdtrit

from pmd.planning.sweep.table import Row

CONFIDENCE = 0.95
WITH_MEMORY = "with memory"


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


@dataclass(frozen=True, slots=True)
class DifferenceRow:
    """One arm of a block, minus the reference arm of the block."""

    block: str
    label: str
    differences: Mapping[str, PairedDifference]  # of avg, pass@k, and of avg with memory from the reference without


def difference_rows(rows: Sequence[Row], reference: str) -> list[DifferenceRow]:
    """Compare each arm with the arm `reference` of its block, at equal rollouts and in the blocks at equal tokens.

    The score with memory in the prompt is compared with the reference's score without memory: what a memory is worth to
    a policy that did not learn from it, against what the reference learned. A reference that was only scored with
    memory is compared with that.
    """
    references = {row.block: row.scores for row in rows if row.label == reference}
    found: list[DifferenceRow] = []
    for row in rows:
        base = references.get(row.block, {})
        against = {name: "avg" if name == WITH_MEMORY and "avg" in base else name for name in row.scores}
        pairs = {name: paired_difference(own, base.get(against[name], {})) for name, own in row.scores.items()}
        kept = {name: difference for name, difference in pairs.items() if difference is not None}
        if row.label == reference:
            kept = {name: difference for name, difference in kept.items() if against[name] != name}
        if kept:
            found.append(DifferenceRow(row.block, row.label, kept))
    return found


def print_differences(rows: Sequence[DifferenceRow], reference: str, console: Console) -> None:
    """Print the table, with a section for each block."""
    names = _names(rows)
    table = Table(title=_title(reference), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for block in dict.fromkeys(row.block for row in rows):
        table.add_section()
        if block:
            table.add_row(escape(block), style="italic")
        for row in rows:
            if row.block == block:
                table.add_row(f"  {escape(row.label)}", *_cells(row, names))
    console.print(table)


def write_differences(rows: Sequence[DifferenceRow], reference: str, out: Path) -> None:
    """Write differences.md to `out`."""
    names = _names(rows)
    lines = [f"{_title(reference)}.", "", f"| method | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for block in dict.fromkeys(row.block for row in rows):
        lines += [f"| *{block}* |" + " |" * len(names)] if block else []
        lines += [f"| {row.label} | {' | '.join(_cells(row, names))} |" for row in rows if row.block == block]
    (out / "differences.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _names(rows: Sequence[DifferenceRow]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name in row.differences)
    return sorted(names, key=lambda name: name == WITH_MEMORY)  # stable: it comes last


def _cells(row: DifferenceRow, names: Sequence[str]) -> list[str]:
    return [str(row.differences[name]) if name in row.differences else "-" for name in names]


def _title(reference: str) -> str:
    return (
        f"minus {reference}, paired by seed: percentage points, mean ± 95 % interval; with memory: minus {reference} "
        "without memory (with memory, if it was only scored so)"
    )
