"""Writes the checkpoints of a run, and puts Lightning's loop where a resumed run goes on.

The checkpoint of an epoch is written after the epoch's last row is on the disk, so the log is never behind it: when the
next epoch starts, or when training ends. Those within an epoch (`checkpoint_every_steps`) are written when the next
batch is asked for, because Lightning logs a step's row after all callbacks. So are those of an evaluation within an
epoch (`verification.every_steps`) that is the best so far. best.ckpt is a copy of what last.ckpt was when validation
was best.
"""

import math
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from pmd import __version__
from pmd.atomic import replacing
from pmd.batch import Batch
from pmd.callbacks.verification import MONITOR
from pmd.checkpoint_file import FORMAT, read_checkpoint, write_checkpoint
from pmd.checkpoint_shards import SUFFIX, remove_unnamed, write_divided
from pmd.errors import CheckpointError, DiskError
from pmd.metrics_log import MetricsLog
from pmd.ranks import Ranks
from pmd.rollouts.datamodule import RolloutDataModule
from pmd.run_dir import RunDir


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Has Lightning write and read pmd's file format: atomic, with a digest, loaded without running code."""

    def __init__(self, ranks: Ranks | None = None):
        """Write and read alone, or together with the `ranks` that divide the weights."""
        self.ranks = ranks

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`; see `write_checkpoint` and `write_divided`."""
        if self.ranks is None:
            write_checkpoint(Path(path), checkpoint)
            if any(Path(path).parent.glob(f"*{SUFFIX}")):  # the run has divided the weights before
                remove_unnamed(Path(path).parent)
        else:
            write_divided(Path(path), checkpoint, self.ranks)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        """Return what is at `path`; see `read_checkpoint`."""
        return read_checkpoint(Path(path), mmap=self.ranks is not None)  # a rank needs a part of each tensor only


class CheckpointCallback(Checkpoint):
    """Writes last.ckpt after every epoch, and both it and best.ckpt after the best evaluation so far.

    With `every_steps`, last.ckpt is also written at the first end of a rollout batch after that many steps.
    """

    def __init__(self, run_dir: RunDir, settings: dict[str, Any], every_steps: int | None = None):
        self.run_dir = run_dir
        self.every_steps = every_steps
        self.settings = settings  # the configuration, as plain values
        self.best_score = -math.inf
        self.best_step: int | None = None  # of the data
        self._epoch: int | None = None  # whose checkpoint is still to be written
        self._written_at = 0  # step of the data at the last checkpoint
        self._batch_is_over = False  # whether the latest step was the last of its rollout batch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the data to say when a step is over."""
        self._written_at = _step(trainer)
        if self.every_steps is not None:
            data_of(trainer).between_batches = partial(self._write_if_due, trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Note whether a rollout batch is over; after an evaluation that is the best so far, a checkpoint is due."""
        self._batch_is_over = batch.is_last
        if self._compare(trainer):
            data_of(trainer).between_batches = partial(self._write_if_due, trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that a checkpoint is due, and whether it is the best."""
        self._epoch = trainer.current_epoch
        self._compare(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint of the epoch before."""
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint of the last epoch."""
        self._write(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the configuration and the version."""
        checkpoint["epoch"] = trainer.current_epoch if self._epoch is None else self._epoch
        checkpoint["pmd"] = {"format": FORMAT, "version": __version__, "config": self.settings}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Have the loop begin an epoch where the data goes on; the data leaves out the tasks that are done."""
        position = checkpoint["RolloutDataModule"]
        start_loop_at(checkpoint["loops"]["fit_loop"], position["epoch"], position["step"])

    def state_dict(self) -> dict[str, Any]:
        """Return the best score so far, and after which step it was reached."""
        return {"best_score": self.best_score, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score so far."""
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]

    def _compare(self, trainer: Trainer) -> bool:
        """Note the latest evaluation if it is the best so far, and return whether it is."""
        score = trainer.callback_metrics.get(MONITOR)
        if score is None or float(score) <= self.best_score:
            return False
        self.best_score, self.best_step = float(score), _step(trainer)
        return True

    def _write_if_due(self, trainer: Trainer) -> None:
        """Write a checkpoint within an epoch."""
        num_steps = _step(trainer) - self._written_at
        is_due = self.every_steps is not None and num_steps >= self.every_steps
        if self._batch_is_over and (is_due or self.best_step == _step(trainer)):
            self._save(trainer)

    def _write(self, trainer: Trainer) -> None:
        if self._epoch is None:
            return
        self._save(trainer)
        self._epoch = None

    def _save(self, trainer: Trainer) -> None:
        """Write last.ckpt, and copy it if it is the best."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsLog):
                logger.commit()
        trainer.save_checkpoint(self.run_dir.last)
        self._written_at = _step(trainer)
        if self.best_step == _step(trainer) and trainer.is_global_zero:
            copy_checkpoint(self.run_dir.last, self.run_dir.best)


def copy_checkpoint(source: Path, target: Path) -> None:
    """Replace `target` by a copy of `source`.

    Raises:
        DiskError: it could not be written; `target` is unchanged.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as file, replacing(target) as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
    except OSError as error:
        raise DiskError(
            f"checkpoint={target} could not be written ({error.strerror}); {source} is kept: free space and resume."
        ) from error


def restore_best(run_dir: RunDir, resumed: Path, state: dict[str, Any]) -> None:
    """Write best.ckpt if the resumed checkpoint is the best one and a kill came before it was copied."""
    callbacks = state["callbacks"].get(CheckpointCallback.__qualname__, {})
    step = state["RolloutDataModule"]["step"]
    if callbacks.get("best_step") != step or resumed == run_dir.best:
        return
    with suppress(CheckpointError):
        if read_checkpoint(run_dir.best)["RolloutDataModule"]["step"] == step:
            return
    shards = state["pmd"].get("shards")
    if shards is not None and resumed.parent != run_dir.checkpoints:
        shutil.copytree(shards["path"], run_dir.checkpoints / shards["folder"], dirs_exist_ok=True)
    copy_checkpoint(resumed, run_dir.best)


def start_loop_at(fit_loop: dict[str, Any], epoch: int, step: int) -> None:
    """Change the saved state of Lightning's loop so that it begins `epoch` next, after `step` optimizer steps."""
    fit_loop["epoch_progress"] = {name: _counts(epoch) for name in ("total", "current")}
    batches = {"total": _counts(step), "current": _counts(0), "is_last_batch": False}
    fit_loop["epoch_loop.batch_progress"] = batches
    fit_loop["epoch_loop.state_dict"] = {"_batches_that_stepped": step}


def _step(trainer: Trainer) -> int:
    """Return after how many steps of the data the run is."""
    return data_of(trainer).position.step


def data_of(trainer: Trainer) -> RolloutDataModule:
    """Return the data module that a trainer fits with."""
    data = cast(Any, trainer).datamodule
    assert isinstance(data, RolloutDataModule)
    return data


def _counts(number: int) -> dict[str, int]:
    return dict.fromkeys(("ready", "started", "processed", "completed"), number)
