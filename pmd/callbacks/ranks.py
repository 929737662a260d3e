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
        self.told: set[str] = set()  # metrics that rank 0 alone logs

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on together once a frozen memory is built."""
        self.meet({})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on together once the memory is updated; all ranks have its metrics, for callbacks that monitor them."""
        own = {name: float(value) for name, value in trainer.callback_metrics.items()}
        figures = self.meet(own)
        self.told |= figures.keys() - own.keys()
        pl_module.log_dict({name: figures[name] for name in self.told}, logger=False, batch_size=1)
        if self.parity is not None:
            self.parity.measure(trainer.precision_plugin.forward_context())
