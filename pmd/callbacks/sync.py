"""After every optimizer step the engine takes over the student's weights; after an epoch a frozen teacher may too."""

import time

from lightning import Callback, LightningModule, Trainer

from pmd.module import PMDModule
from pmd.rollouts.batch import Batch
from pmd.rollouts.engine import Engine


class WeightSyncCallback(Callback):
    """Keeps the engine at the policy's version, so that each completion can name the weights that sampled it."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the engine up to a fresh or resumed policy."""
        assert isinstance(pl_module, PMDModule)
        self.engine.sync(pl_module.policy_version)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Hand the engine the weights that the step made."""
        assert isinstance(pl_module, PMDModule)
        started = time.perf_counter()
        self.engine.sync(pl_module.policy_version)
        pl_module.log("time/sync_s", time.perf_counter() - started, batch_size=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refresh a frozen teacher that is due."""
        assert isinstance(pl_module, PMDModule)
        refreshed = pl_module.policy.after_epoch(trainer.current_epoch)
        pl_module.log("teacher/refreshed", float(refreshed), batch_size=1)
