"""metrics.csv: one row for each optimizer step and each epoch's end.

Rows with generated tokens also carry the run's sum so far, reflections included, so that a curve can be read at equal
cost; and the processor seconds since the last such row. Rows are appended, and the file is replaced whole when a new
metric needs a column. `commit` makes all rows survive a
power cut; it is called before each checkpoint, so that a resumed run finds every row up to its checkpoint, and drops
the later ones, which it will write again.
"""

import csv
import io
import os
import time
from typing import Any

from lightning.pytorch.loggers import Logger

from pmd.atomic import replace_text
from pmd.errors import DiskError
from pmd.run_dir import GENERATED, GENERATED_SO_FAR, RunDir


class MetricsLog(Logger):
    """Lightning's logger for metrics.csv."""

    name: Any = ""  # names and versions are for folders of several logs; a run directory has one
    version: Any = ""

    def __init__(self, run_dir: RunDir, resumed_at: int | None = None, *, keep_later: bool = False):
        """Continue or begin the file.

        Args:
            resumed_at: optimizer step at which a run is resumed: earlier rows are kept; None begins a new file.
            keep_later: write nothing until `commit`: the run also has a later checkpoint, whose rows are needed until a
                new checkpoint takes its place.
        """
        super().__init__()
        self.run_dir = run_dir
        self._columns: list[str] = []
        self._pending: list[dict[str, Any]] = []
        self._before = 0 if resumed_at is None else resumed_at  # rows already in the file count up to this step
        self._is_checked = False  # whether the file holds no other rows
        self._keep_later = keep_later
        self._num_generated = self._generated_before()
        self._cpu_s = time.process_time()
        if resumed_at is not None and not keep_later:
            self._guarded(self._rewrite)  # at once: the first step is minutes away

    @property
    def save_dir(self) -> str:
        """The run directory."""
        return str(self.run_dir.root)

    def log_hyperparams(self, params: Any, *args: Any) -> None:
        """Do nothing: config.yaml holds the configuration."""

    def log_graph(self, *args: Any) -> None:
        """Start the processor's clock: Lightning calls this when training begins."""
        self._cpu_s = time.process_time()

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Add one row."""
        values = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        if "epoch" in metrics:
            values["epoch"] = int(metrics["epoch"])
        self._pending.append(values | self._costs(values) | {"step": step})

    def save(self) -> None:
        """Append the rows that were added since the last time.

        Raises:
            DiskError: they could not be written.
        """
        if self._pending and not self._keep_later:
            self._guarded(self._append)

    def commit(self) -> None:
        """Write all rows and wait until they are on the disk.

        Raises:
            DiskError: they could not be written.
        """
        self._keep_later = False
        self._guarded(self._append)
        with self.run_dir.metrics.open("rb") as file:
            os.fsync(file.fileno())

    def finalize(self, status: str) -> None:
        """Write the remaining rows; after a failure, as far as the disk allows."""
        try:
            self.save()
        except DiskError:
            if status == "success":
                raise

    def _costs(self, values: dict[str, float]) -> dict[str, float]:
        """Return what a row adds to its metrics if they say that the policy has generated something."""
        if values.keys().isdisjoint(GENERATED):
            return {}
        now = time.process_time()
        seconds, self._cpu_s = now - self._cpu_s, now
        self._num_generated += sum(values.get(name, 0.0) for name in GENERATED)
        return {GENERATED_SO_FAR: self._num_generated, "time/cpu_s": seconds}

    def _generated_before(self) -> float:
        """Return the tokens generated in the rows that a resumed run keeps."""
        rows = self.run_dir.read_metrics() if self._before else []
        kept = [row for row in rows if float(row["step"]) < self._before]
        return max((float(row.get(GENERATED_SO_FAR) or 0) for row in kept), default=0.0)

    def _append(self) -> None:
        if not self._is_checked or not set().union(*self._pending) <= set(self._columns):
            self._rewrite()
        elif self._pending:
            text = io.StringIO()
            csv.DictWriter(text, self._columns).writerows(self._pending)
            with self.run_dir.metrics.open("a", encoding="utf-8", newline="") as file:
                file.write(text.getvalue())
        self._pending = []

    def _rewrite(self) -> None:
        """Replace the file: the rows it has, if they are of this run, then the new ones, under a header for both."""
        rows: list[dict[str, Any]] = list(self.run_dir.read_metrics())
        if not self._is_checked:
            rows = [row for row in rows if float(row["step"]) < self._before]
        rows += self._pending
        columns = sorted(set().union(*rows))
        text = io.StringIO()
        if rows:
            writer = csv.DictWriter(text, columns)
            writer.writeheader()
            writer.writerows(rows)
        replace_text(self.run_dir.metrics, text.getvalue())
        self._columns, self._is_checked = columns, True

    def _guarded(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            raise DiskError(
                f"metrics={self.run_dir.metrics} could not be written ({error.strerror}); what it held is kept."
            ) from error
