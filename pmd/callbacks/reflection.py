"""Records the rollouts of an epoch, and has the policy reflect on them when the epoch ends."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from lightning import Callback, LightningModule, Trainer

from pmd.batch import Batch, Example
from pmd.memory import EpochRecord, GroupRecord, ProceduralMemory
from pmd.memory.reflect import Reflections, Reflector

log = logging.getLogger(__name__)


class ReflectionCallback(Callback):
    """Records each batch's rollouts and what their teachers were shown; reflects on them at the end of the epoch.

    With `memory.update: batch`, the stream of batches has reflected on them already.
    """

    def __init__(self, record: EpochRecord, memory: ProceduralMemory, reflector: Reflector):
        self.record, self.memory, self.reflector = record, memory, reflector

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count, unless a checkpoint within this epoch was resumed."""
        if self.record.epoch != trainer.current_epoch:
            self.record.start(trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Record the batch, and whether it is the epoch's last."""
        self.record.is_complete = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self.collect(batch)

    def collect(self, batch: Batch) -> None:
        """Record the batch's rollouts and what their teachers were shown."""
        if self.memory.config.update == "epoch":
            self.record.num_steps += 1
        groups: dict[str, list[Example]] = {}
        for example in batch.examples:
            groups.setdefault(example.rollout.group_id, []).append(example)
        for group_id, examples in groups.items():
            group = self._group(batch.step, examples)
            self.record.num_groups += 1
            self.record.num_hits += bool(group.items)
            if not self.memory.is_closed:
                self.record.groups[group_id] = group
            for example in examples:
                if example.context.items:
                    prompts = len(example.context.prompt_ids), len(example.rollout.prompt_ids)
                    self.record.num_memory_tokens += prompts[0] - prompts[1]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reflect, unless the memory was updated with each batch; say so if what was written cannot be read.

        Nothing happens if the memory is closed, or the epoch is to be resumed.
        """
        if self.memory.is_closed or not (self.record.is_complete and self.reflector.config.enabled):
            return
        found = self._reflect(pl_module) if self.memory.config.update == "epoch" else self.record.reflected
        if problem := found.describe_failure(self.reflector.config):
            log.warning("epoch %d: %s", self.record.epoch, problem)

    def _reflect(self, pl_module: LightningModule) -> Reflections:
        started = time.perf_counter()
        groups = [group.rollouts for group in self.record.groups.values()]
        found = self.reflector.reflect(groups, str(self.record.epoch), self.memory.known_insights)
        self.record.reflections = found
        pl_module.log_dict(found.figures() | {"time/reflect_s": time.perf_counter() - started}, batch_size=1)
        return found

    def _group(self, step: int, examples: Sequence[Example]) -> GroupRecord:
        """Return the record of a group; its rollouts are left out where an update has written them."""
        first, shown = examples[0], examples[0].context
        known = {*shown.items, *shown.dropped}
        # An attempt kept in memory is not shown to the rollout that it is, which may be the first.
        others = [item for example in examples for item in example.context.items if item not in known]
        rollouts = []
        if self.memory.config.update == "epoch":
            rollouts = [replace(e.rollout, completion=replace(e.rollout.completion, logprobs=())) for e in examples]
        return GroupRecord(
            step,
            self.reflector.tasks[first.rollout.task_id],
            rollouts,
            items=(*shown.items, *dict.fromkeys(others)),
            dropped=shown.dropped,
            memory_generation=shown.memory_generation,
        )
