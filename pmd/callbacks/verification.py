"""Held-out evaluation at epoch boundaries: memory-free, and memory-conditioned beside it.

The gap between the two is what memory knows and the policy does not yet.
"""

import time

from lightning import Callback, LightningModule, Trainer

from pmd.evaluation.evaluate import Evaluator
from pmd.evaluation.metrics import Scores, score_samples
from pmd.memory import ProceduralMemory
from pmd.types import Task


class VerificationCallback(Callback):
    """Logs `verify/...` on the validation problems; `ModelCheckpoint` watches `verify/avg`."""

    def __init__(self, evaluator: Evaluator, tasks: list[Task], memory: ProceduralMemory | None):
        self.evaluator = evaluator
        self.tasks = tasks
        self.memory = memory

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the policy stands before the first step; a resumed run has said so (its steps are counted now)."""
        if trainer.global_step == 0 and trainer.logger is not None:
            for logger in trainer.loggers:
                logger.log_metrics(self.measure(), step=0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate every `verification.every_epochs`, and after the last epoch."""
        epoch, config = trainer.current_epoch + 1, self.evaluator.config
        is_last = epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps or trainer.should_stop
        if is_last or epoch % config.every_epochs == 0:
            started = time.perf_counter()
            metrics = self.measure()
            metrics["time/verification_s"] = time.perf_counter() - started
            pl_module.log_dict(metrics, batch_size=1)
            pl_module.log("held_out", metrics["verify/avg"], prog_bar=True, logger=False, batch_size=1)

    def measure(self) -> dict[str, float]:
        """Evaluate the validation problems now."""
        config = self.evaluator.config
        free = score_samples(self.evaluator.memory_free(self.tasks, config.samples), config.pass_at)
        metrics = _flatten("verify", free)
        if self.memory is not None and config.memory_conditioned:
            samples = self.evaluator.memory_conditioned(self.tasks, config.samples, self.memory)
            with_memory = score_samples(samples, config.pass_at)
            metrics["verify/memory_conditioned_avg"] = with_memory.avg
            metrics["verify/not_internalised"] = with_memory.avg - free.avg
        return metrics


def _flatten(room: str, scores: Scores) -> dict[str, float]:
    metrics = {f"{room}/avg": scores.avg, f"{room}/valid_rate": scores.valid_rate}
    metrics |= {f"{room}/pass_at_{k}": value for k, value in scores.pass_at.items()}
    metrics |= {f"{room}/coverage_at_{k}": value for k, value in scores.coverage_at.items()}
    if len(scores.by_domain) > 1:
        metrics |= {f"{room}/{domain}_avg": part.avg for domain, part in scores.by_domain.items()}
    return metrics
