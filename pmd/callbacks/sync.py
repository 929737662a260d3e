"""Gives the engine the student's new weights after the optimizer steps of each rollout batch."""

import time

from lightning import Callback, LightningModule, Trainer

from pmd.batch import Batch
from pmd.engines.base import Engine
from pmd.engines.parity import ParityCheck
from pmd.module import PMDModule


class WeightSyncCallback(Callback):
    """Keeps the engine at the policy's version, and has the engine and the trainer take turns on the GPU.

    If a reflection made the engine load another role's weights, it reloads the student's when it next generates.
    """

    def __init__(self, engine: Engine, parity: ParityCheck | None):
        self.engine, self.parity = engine, parity
        self._sleep_s = 0.0  # spent putting the engine to sleep since the last sync

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the weights of a new or resumed policy into the engine."""
        self._sync(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Put the engine to sleep, so that the trainer has the GPU."""
        started = time.perf_counter()
        self.engine.sleep()
        self._sleep_s += time.perf_counter() - started

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Sync after the last step of a rollout batch, and after the run's last step, which may come earlier."""
        ends_run = trainer.global_step == trainer.max_steps or trainer.should_stop
        if ends_run or batch.is_last:
            pl_module.log_dict(self._sync(trainer, pl_module) | {"time/sleep_s": self._sleep_s}, batch_size=1)
            self._sleep_s = 0.0
        else:  # else Lightning would repeat the seconds of the last sync in this step's row
            pl_module.log_dict(dict.fromkeys(("time/wake_s", "time/sync_s", "time/sleep_s"), 0.0), batch_size=1)

    def _sync(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Wake the engine, load the student's weights, and check that it computes the same log-probs as the trainer."""
        assert isinstance(pl_module, PMDModule)
        started = time.perf_counter()
        self.engine.wake()
        waking = time.perf_counter()
        self.engine.sync(pl_module.policy_version)
        seconds = {"time/wake_s": waking - started, "time/sync_s": time.perf_counter() - waking}
        return seconds | (self.parity.measure(trainer.precision_plugin.forward_context()) if self.parity else {})
