"""Writes the per-token record of a step into the run directory, for `pmd inspect step`."""

from pathlib import Path

from lightning import Callback, LightningModule, Trainer

from pmd.module import PMDModule
from pmd.rollouts.batch import Batch


class TraceCallback(Callback):
    """Keeps every `every`-th step."""

    def __init__(self, folder: Path, every: int):
        self.folder = folder
        self.every = every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Write the step's trace if it is due."""
        assert isinstance(pl_module, PMDModule)
        if pl_module.trace is not None and batch.step % self.every == 0:
            pl_module.trace.write(self.folder)
