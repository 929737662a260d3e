"""Has the policy reflect on the epoch's verified rollouts when the epoch ends."""

import logging
import time
from collections.abc import Mapping

from lightning import Callback, LightningModule, Trainer

from pmd.batch import Batch
from pmd.config.schema import ReflectionConfig
from pmd.engines.base import Engine
from pmd.memory import EpochRecord, GroupRecord, ProceduralMemory
from pmd.memory.reflect import reflect
from pmd.tasks.prompts.base import PromptFormat
from pmd.types import Task

log = logging.getLogger(__name__)


class ReflectionCallback(Callback):
    """Records each batch's rollouts and reflects on them at the end of the epoch, until a frozen memory is built."""

    def __init__(
        self,
        record: EpochRecord,
        engine: Engine,
        prompts: PromptFormat,
        tasks: Mapping[str, Task],
        config: ReflectionConfig,
        memory: ProceduralMemory,
        seed: int,
    ):
        self.record, self.engine, self.prompts, self.tasks = record, engine, prompts, tasks
        self.config, self.memory, self.seed = config, memory, seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start an empty record."""
        self.record.start(trainer.current_epoch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Record the batch's rollouts and what their teachers were shown."""
        for example in batch.examples:
            rollout, context = example.rollout, example.context
            group = self.record.groups.setdefault(
                rollout.group_id,
                GroupRecord(
                    batch.step,
                    self.tasks[rollout.task_id],
                    rollouts=[],
                    items=context.items,
                    dropped=context.dropped,
                    memory_generation=context.memory_generation,
                ),
            )
            group.rollouts.append(rollout)
            if context.items:
                self.record.num_memory_tokens += len(context.prompt_ids) - len(rollout.prompt_ids)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reflect, unless the memory is frozen and already built."""
        if not self.config.enabled or self.memory.is_closed(self.record.epoch):
            return
        started = time.perf_counter()
        found = self.record.reflections = reflect(
            self.engine,
            self.tasks,
            [group.rollouts for group in self.record.groups.values()],
            self.prompts,
            self.config,
            f"{self.seed}/reflect/{self.record.epoch}",
            self.memory.known_insights,
        )
        pl_module.log_dict(
            {
                "reflect/num_prompts": float(found.num_prompts),
                "reflect/num_insights": float(len(found.changes)),
                "reflect/malformed": float(found.num_malformed),
                "reflect/rejected_items": float(found.num_rejected),
                "reflect/retried": float(found.num_retried),
                "reflect/unknown_targets": float(found.num_unknown),
                "reflect/overlong": float(found.num_overlong),
                "reflect/shortened": float(found.num_shortened),
                "reflect/nothing_to_say": float(found.num_silent),
                "reflect/num_tokens": float(found.num_tokens),
                "time/reflect_s": time.perf_counter() - started,
            },
            batch_size=1,
        )
        if problem := found.describe_failure(self.config):
            log.warning("epoch %d: %s", self.record.epoch, problem)
