"""Decides from audits which items are retired, quarantined or internalized.

An audit measures how much an item raised the teacher's log-probability of correct and of wrong attempts over a placebo,
in one group (see `pmd.memory.audit`). It is stored as a row of `audits`, updates the item's usefulness, and may change
its status. Items with the same kind and text share their evidence, because the teacher sees only the text.

A lift counts only if it exceeds `memory.audit_margin` by two standard errors (our choice; the paper has no audits):

- harmful: lowers correct attempts, or raises wrong ones more than correct ones. Retired for good.
- leaking: separates correct from wrong attempts only at the tokens of the answer. Quarantined.
- internalized: helps the teacher, but no longer helps a student that solves the task. Undone if that lift returns.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

from pmd.config.schema import MemoryConfig
from pmd.memory.store import LIVE, TABLES, Ledger

SURE = 2.0  # standard errors
LEAK_SHARE = 0.1  # share of the usefulness that must remain without the answer span


@dataclass(frozen=True, slots=True)
class ItemAudit:
    """One item's lift in one group, in nats per token; None if there was nothing to measure."""

    step: int
    group_id: str
    level: int
    item_id: int
    num_correct: int  # attempts scored
    num_wrong: int
    lift_correct: float | None
    lift_wrong: float | None
    masked_lift_correct: float | None  # without the answer span
    masked_lift_wrong: float | None
    student_lift: float | None  # the student's own lift, if all attempts of the group are correct

    @property
    def usefulness(self) -> float | None:
        """Lift on correct attempts minus lift on wrong ones, in this group."""
        return _difference(self.lift_correct, self.lift_wrong)

    @property
    def masked_usefulness(self) -> float | None:
        """The same without the answer span."""
        return _difference(self.masked_lift_correct, self.masked_lift_wrong)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over groups with its standard error."""

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate | None":
        """Estimate from one value per group; None without values. A single value has an infinite error."""
        if not values:
            return None
        mean = math.fsum(values) / len(values)
        if len(values) == 1:
            return cls(mean, math.inf, 1)
        variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        return cls(mean, math.sqrt(variance / len(values)), len(values))

    def minus(self, other: "Estimate") -> "Estimate":
        """Return the difference of two independent estimates."""
        return Estimate(self.mean - other.mean, math.hypot(self.error, other.error), min(self.count, other.count))

    def above(self, bound: float, evidence: int) -> bool:
        """Whether the mean is above the bound by `SURE` standard errors, given at least `evidence` groups."""
        return self.count >= evidence and self.mean - SURE * self.error > bound

    def below(self, bound: float, evidence: int) -> bool:
        """Whether the mean is below the bound by `SURE` standard errors, given at least `evidence` groups."""
        return self.count >= evidence and self.mean + SURE * self.error < bound


@dataclass(frozen=True, slots=True)
class Evidence:
    """All audits of one text."""

    correct: Estimate | None
    wrong: Estimate | None
    masked: Estimate | None  # usefulness without the answer span
    student: Estimate | None  # from the latest audits only, because the lift fades as the student learns

    @property
    def usefulness(self) -> Estimate | None:
        """Lift on correct attempts minus lift on wrong ones."""
        return self.correct.minus(self.wrong) if self.correct and self.wrong else None

    def verdict(self, status: str, config: MemoryConfig) -> tuple[str, str]:
        """Return the new status and the reason; the current status and an empty reason if nothing changes."""
        evidence, margin, useful = config.audit_evidence, config.audit_margin, self.usefulness
        if self.correct and self.correct.below(-margin, evidence):
            return "retired", f"audit: harmful, lowers correct attempts by {-self.correct.mean:.3f}"
        if useful and useful.below(-margin, evidence):
            return "retired", f"audit: harmful, favours wrong attempts by {-useful.mean:.3f}"
        useful_surely = useful is not None and useful.above(margin, evidence)
        if useful and useful_surely and self.masked and self.masked.below(LEAK_SHARE * useful.mean, evidence):
            return "quarantined", "audit: its use lies in the answer alone"
        helps = useful.mean > margin if useful else bool(self.correct and self.correct.mean > margin)
        fades = self.student is not None and self.student.count >= evidence and abs(self.student.mean) <= margin
        if status == "active" and helps and fades and self.student:
            return "internalized", f"audit: internalized, the student gains {self.student.mean:.3f}"
        if status == "internalized" and self.student and self.student.above(margin, evidence):
            return "active", f"audit: no longer internalized, the student gains {self.student.mean:.3f}"
        return status, ""


def write_audits(ledger: Ledger, audits: Sequence[ItemAudit]) -> None:
    """Add one row per audit."""
    columns = [field.name for field in fields(ItemAudit)]
    extra = ["usefulness", "masked_usefulness", "generation", "version"]
    marks = ", ".join("?" * (len(columns) + len(extra)))
    rows = []
    for audit in audits:
        version = ledger.db.execute(f"SELECT version FROM {TABLES[audit.level]} WHERE id = ?", (audit.item_id,))
        found = version.fetchone()
        if found is not None:  # only a rollback deletes items of levels 1 and 2
            rows.append((*astuple(audit), audit.usefulness, audit.masked_usefulness, ledger.generation, found[0]))
    ledger.db.executemany(f"INSERT INTO audits ({', '.join([*columns, *extra])}) VALUES ({marks})", rows)


def judge(ledger: Ledger, audits: Sequence[ItemAudit], config: MemoryConfig) -> dict[str, int]:
    """Update all items whose text was audited; return how many changed to each status."""
    counts: dict[str, int] = {}
    done: set[tuple[int, int]] = set()
    for level, item_id in sorted({(audit.level, audit.item_id) for audit in audits}):
        if (level, item_id) in done:
            continue
        copies = _copies(ledger, level, item_id)
        done |= {(level, copy_id) for copy_id, _ in copies}
        evidence = gather(ledger, level, [copy_id for copy_id, _ in copies], config.audit_evidence)
        useful = evidence.usefulness
        for copy_id, status in copies:
            new, reason = evidence.verdict(status, config)
            values: dict[str, object] = {"usefulness": useful.mean if useful else None}
            if new != status:
                values["status"] = new
                counts[new] = counts.get(new, 0) + 1
            ledger.change(level, copy_id, values, reason or "audit")
    return counts


def gather(ledger: Ledger, level: int, item_ids: Sequence[int], evidence: int) -> Evidence:
    """Pool all audits of the current versions of these items, which share one text."""
    marks = ", ".join("?" * len(item_ids))
    rows = ledger.db.execute(
        "SELECT lift_correct, lift_wrong, masked_lift_correct, masked_lift_wrong, student_lift FROM audits a"
        f" JOIN {TABLES[level]} item ON item.id = a.item_id AND item.version = a.version"
        f" WHERE a.level = ? AND a.item_id IN ({marks}) ORDER BY a.id",
        (level, *item_ids),
    ).fetchall()
    columns = [[row[n] for row in rows if row[n] is not None] for n in range(5)]
    correct, wrong, masked_correct, masked_wrong = (Estimate.of(column) for column in columns[:4])
    masked = masked_correct.minus(masked_wrong) if masked_correct and masked_wrong else None
    return Evidence(correct, wrong, masked, Estimate.of(columns[4][-evidence:]))


def _copies(ledger: Ledger, level: int, item_id: int) -> list[tuple[int, str]]:
    """Return ids and statuses of the live items that have the same text (and kind), by id."""
    same_kind = "AND other.kind = item.kind " if level == 1 else ""
    rows = ledger.db.execute(
        f"SELECT other.id, other.status FROM {TABLES[level]} item JOIN {TABLES[level]} other"
        f" ON other.content = item.content {same_kind}WHERE item.id = ? AND other.{LIVE} ORDER BY other.id",
        (item_id,),
    )
    return rows.fetchall()


def _difference(first: float | None, second: float | None) -> float | None:
    return first - second if first is not None and second is not None else None
