"""After a rollout batch's optimizer steps the engine takes over the student's weights."""

import time

from lightning import Callback, LightningModule, Trainer

from pmd.batch import Batch
from pmd.engines.base import Engine
from pmd.engines.parity import ParityCheck
from pmd.module import PMDModule


class WeightSyncCallback(Callback):
    """Keeps the engine at the policy's version, so that each completion can name the weights that sampled it."""

    def __init__(self, engine: Engine, updates_per_batch: int, parity: ParityCheck | None):
        self.engine, self.updates_per_batch, self.parity = engine, updates_per_batch, parity
        self._sleep_s = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the engine up to a fresh or resumed policy."""
        self._sync(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Give the GPU to the trainer."""
        started = time.perf_counter()
        self.engine.sleep()
        self._sleep_s += time.perf_counter() - started

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Hand the engine the weights that the steps of this rollout batch made."""
        if (batch.step + 1) % self.updates_per_batch == 0:
            pl_module.log_dict(self._sync(trainer, pl_module) | {"time/sleep_s": self._sleep_s}, batch_size=1)
            self._sleep_s = 0.0

    def _sync(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Wake the engine, hand it the weights, and see that it computes what the trainer computes."""
        assert isinstance(pl_module, PMDModule)
        started = time.perf_counter()
        self.engine.wake()
        waking = time.perf_counter()
        self.engine.sync(pl_module.policy_version)
        seconds = {"time/wake_s": waking - started, "time/sync_s": time.perf_counter() - waking}
        return seconds | (self.parity.measure(trainer.precision_plugin.forward_context()) if self.parity else {})
