"""Keeps the ranks of a run on several devices together while rank 0 reflects and updates the memory."""

from collections.abc import Callable

from lightning import Callback, LightningModule, Trainer

from pmd.engines.parity import ParityCheck


class RanksCallback(Callback):
    """Stands behind rank 0's memory callback, and in place of it on the other ranks."""

    def __init__(self, meet: Callable[[dict[str, float]], dict[str, float]], parity: ParityCheck | None = None):
        """Take what keeps the ranks together.

        Args:
            meet: rank 0 releases the others, which follow it until then.
            parity: checks the engines after an epoch's end, if they have slept meanwhile.
        """
        self.meet, self.parity = meet, parity

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on together once a frozen memory is built."""
        self.meet({})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on together once the memory is updated."""
        self.meet({})
        if self.parity is not None:
            self.parity.measure(trainer.precision_plugin.forward_context())
