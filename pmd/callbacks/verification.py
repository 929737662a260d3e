"""Held-out evaluation at epoch ends and within epochs, without memory and, for comparison, with memory in the prompt.

The gap between the two is what memory provides and the policy has not internalized yet.
"""

import math
import time

from lightning import Callback, LightningModule, Trainer

from pmd.batch import Batch
from pmd.callbacks.completions import MAX_ROWS, EvaluationTables, log_table
from pmd.evaluation.evaluate import Evaluator
from pmd.evaluation.metrics import Scores, score_samples
from pmd.memory import ReadableMemory
from pmd.types import Rollout, Task

TABLE = "validation"
MONITOR = "verify/avg"  # which the best checkpoint has the best of


class VerificationCallback(Callback):
    """Logs `verify/...` on the validation tasks; the best checkpoint is the one with the best `verify/avg`."""

    def __init__(
        self,
        evaluator: Evaluator,
        tasks: list[Task],
        memory: ReadableMemory | None,
        tables: EvaluationTables | None = None,
    ):
        self.evaluator = evaluator
        self.tasks = tasks
        self.memory = memory
        self.tables = tables

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the policy before the first step of a new run."""
        if trainer.global_step == 0 and trainer.logger is not None:
            metrics = self.measure(trainer)
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate every `verification.every_epochs`, and after the last epoch."""
        if self.is_due(trainer):
            metrics = self.measure(trainer)
            pl_module.log_dict(metrics, batch_size=1)
            pl_module.log("held_out", metrics[MONITOR], prog_bar=True, logger=False, batch_size=1)

    def is_due(self, trainer: Trainer) -> bool:
        """Whether the end of the current epoch calls for an evaluation."""
        epoch = trainer.current_epoch + 1
        is_last = epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps or trainer.should_stop
        return is_last or epoch % self.evaluator.config.every_epochs == 0

    def measure(self, trainer: Trainer) -> dict[str, float]:
        """Evaluate on the validation tasks, write the tables, return the metrics, with the seconds that it took."""
        config, started, cpu = self.evaluator.config, time.perf_counter(), time.process_time()
        rollouts: dict[bool, list[Rollout]] = {False: [], True: []}
        keep = {shown: own.append if self.tables is not None else None for shown, own in rollouts.items()}
        samples = self.evaluator.memory_free(self.tasks, config.samples, keep[False])
        without_memory = score_samples(samples, config.pass_at)
        metrics = _flatten(without_memory)
        if self.memory is not None and config.memory_conditioned:
            samples = self.evaluator.memory_conditioned(self.tasks, config.samples, self.memory, keep[True])
            with_memory = score_samples(samples, config.pass_at)
            metrics["verify/memory_conditioned_avg"] = with_memory.avg
            metrics["verify/not_internalized"] = with_memory.avg - without_memory.avg
        if self.tables is not None and trainer.is_global_zero:
            step = trainer.global_step
            rows = self.tables.write(f"{TABLE}-{step:06d}", rollouts, step)
            for logger in trainer.loggers:
                log_table(logger, TABLE, rows[:MAX_ROWS], max(step - 1, 0))
        metrics["time/verification_s"] = time.perf_counter() - started
        metrics["time/verification_cpu_s"] = time.process_time() - cpu
        return metrics


class StepVerificationCallback(Callback):
    """Evaluates within an epoch too, after the batch in which a multiple of `every` optimizer steps was reached.

    It acts after the sync, when the engine has the new weights. A batch that ends an epoch is left to the epoch's end.
    """

    def __init__(self, verification: VerificationCallback, every: int):
        self.verification, self.every = verification, every
        self._done = 0  # multiples of `every` that were reached

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin where a resumed run is."""
        self._done = trainer.global_step // self.every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Evaluate if it is time."""
        reached = trainer.global_step // self.every
        ends_epoch = trainer.is_last_batch or trainer.should_stop or trainer.global_step == trainer.max_steps
        if batch.is_last and reached > self._done:
            self._done = reached
            if not (ends_epoch and self.verification.is_due(trainer)):
                metrics = self.verification.measure(trainer)
                for logger in trainer.loggers:  # not through Lightning, which would repeat the values in the next rows
                    logger.log_metrics(metrics, step=trainer.global_step - 1)
                pl_module.log(MONITOR, metrics[MONITOR], logger=False, batch_size=1)  # for the best checkpoint


def _flatten(scores: Scores) -> dict[str, float]:
    metrics = {MONITOR: scores.avg, "verify/valid_rate": scores.valid_rate}
    metrics |= {f"verify/pass_at_{k}": value for k, value in scores.pass_at.items()}
    metrics |= {f"verify/coverage_at_{k}": value for k, value in scores.coverage_at.items()}
    if not math.isnan(scores.procedural_rate):
        metrics["verify/procedural_words"] = scores.procedural_rate
    if len(scores.by_domain) > 1:
        metrics |= {f"verify/{domain}_avg": part.avg for domain, part in scores.by_domain.items()}
    return metrics
