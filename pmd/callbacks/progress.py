"""Shows how far a run is: one bar for the whole run in a terminal, and a plain line for each epoch everywhere.

What is being generated has a bar of its own below it (rollouts/generate.py), so at most two move, and neither is left
behind. Where there is no terminal, such as in a log file, a line is also printed in the middle of long epochs.
"""

import time
from collections.abc import Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from tqdm import tqdm

from pmd.batch import Batch
from pmd.module import PMDModule

#: What a line shows, in this order: the name of the metric, what it is called, and how it is written.
SHOWN = (
    ("loss", "loss", "{:.3f}"),
    ("reward", "reward", "{:.3f}"),
    ("held_out", "held-out", "{:.1%}"),
    ("memory/insights", "insights", "{:.0f}"),
)
BAR = "{desc} {n_fmt}/{total_fmt} {bar} epoch {epoch_left}, run {remaining} left{postfix}"
#: Seconds without a line after which a log file gets one.
SILENCE_S = 60.0


class EpochBar(tqdm):
    """A bar for the whole run that also says how long the steps of this epoch will take."""

    num_left = 0  # steps of this epoch

    @property
    def format_dict(self) -> dict[str, Any]:
        """Return what the bar's format may name."""
        found = super().format_dict
        num_done = found["n"] - found["initial"]
        left = tqdm.format_interval(found["elapsed"] / num_done * self.num_left) if num_done else "?"
        return {**found, "epoch_left": left}


class ProgressCallback(Callback):
    """Prints a line for each epoch, and shows a bar on standard error if that is a terminal."""

    def __init__(self, *, bar: bool):
        self.bar = bar
        self._bar: EpochBar | None = None
        self._started = self._printed = 0.0
        self._first_step = 0
        self._epoch: int | None = None  # that has begun, and whose line is not printed yet

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar where the run goes on."""
        self._started = self._printed = time.monotonic()
        self._first_step = trainer.global_step
        total = _num_steps(pl_module)
        self._bar = EpochBar(
            total=total, initial=trainer.global_step, desc="step", bar_format=BAR, dynamic_ncols=True,
            disable=None if self.bar else True,
        )  # fmt: skip

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of the epoch before, now that all of it is logged."""
        self._print_epoch(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int
    ) -> None:
        """Move the bar; in a log file, break a long silence."""
        assert self._bar is not None
        self._epoch = trainer.current_epoch
        if not self._bar.disable:
            self._bar.num_left = int(trainer.num_training_batches) - batch_idx - 1
            self._bar.set_postfix_str(_written(trainer.callback_metrics, SHOWN[:2]), refresh=False)
            self._bar.update(trainer.global_step - self._bar.n)
        elif time.monotonic() - self._printed > SILENCE_S:
            self._print(trainer, pl_module, self._epoch, SHOWN[:2])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the last epoch's line, and remove the bar."""
        self._print_epoch(trainer, pl_module)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the bar, so that nothing is written after it on its line."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.leave = False
            self._bar.close()

    def _print_epoch(self, trainer: Trainer, module: LightningModule) -> None:
        if self._epoch is not None:
            self._print(trainer, module, self._epoch, SHOWN)
            self._epoch = None

    def _print(self, trainer: Trainer, module: LightningModule, epoch: int, shown: tuple[Any, ...]) -> None:
        """Print one line above the bar."""
        self._printed = time.monotonic()
        seconds, steps = self._printed - self._started, trainer.global_step - self._first_step
        left = seconds / max(1, steps) * max(0, _num_steps(module) - trainer.global_step)
        of_epochs = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        clock = f"{tqdm.format_interval(left)} left" if left else f"took {tqdm.format_interval(seconds)}"
        tqdm.write(f"epoch {epoch + 1}{of_epochs}: {_written(trainer.callback_metrics, shown)}; {clock}")


def _num_steps(module: LightningModule) -> int:
    assert isinstance(module, PMDModule)
    return module.num_steps or 0


def _written(metrics: Mapping[str, Any], shown: tuple[Any, ...]) -> str:
    """Return the metrics that there are; with all of `SHOWN`, a line has at most 80 characters."""
    found = [(name, form.format(float(metrics[key]))) for key, name, form in shown if key in metrics]
    return ", ".join(f"{name} {value}" for name, value in found)
