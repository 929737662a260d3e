"""Keeps the ranks of a run on several devices together while rank 0 reflects and updates the memory."""

from collections.abc import Callable

from lightning import Callback, LightningModule, Trainer


class RanksCallback(Callback):
    """Stands behind rank 0's memory callback, and in place of it on the other ranks."""

    def __init__(self, meet: Callable[[dict[str, float]], dict[str, float]]):
        self.meet = meet  # rank 0 releases the others, which follow it until then

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on together once a frozen memory is built."""
        self.meet({})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on together once the memory is updated."""
        self.meet({})
