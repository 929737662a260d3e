"""Keeps the per-token record of every n-th step, and of every skipped one, for `pmd inspect step`."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from pmd.batch import Batch
from pmd.module import PMDModule
from pmd.trace import StepTrace


class TraceCallback(Callback):
    """Has the module record every `every`-th step (0: none), and writes its records to the run directory.

    The module makes a record on its own where it skips a step.
    """

    def __init__(self, folder: Path, every: int):
        self.folder = folder
        self.every = every

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Ask for a record if the step is due."""
        assert isinstance(pl_module, PMDModule)
        is_due = self.every > 0 and batch.step % self.every == 0
        pl_module.trace = StepTrace(batch) if is_due else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Write the step's record."""
        assert isinstance(pl_module, PMDModule)
        trace, ranks = pl_module.trace, pl_module.ranks
        if trace is None:
            return
        if ranks is not None:
            trace.records = [record for records in ranks.all(trace.records) for record in records]
        if ranks is None or ranks.is_first:
            trace.write(self.folder)
