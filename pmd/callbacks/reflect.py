"""At the end of an epoch the policy reflects on the epoch's verified rollouts.

Collects the rollouts batch by batch; leaves drafts of insights for `MemoryUpdateCallback`, which runs next.
"""

import time
from collections.abc import Mapping

from lightning import Callback, LightningModule, Trainer

from pmd.config import ReflectionConfig
from pmd.memory.memory import ProceduralMemory
from pmd.prompts.format import PromptFormat
from pmd.reflection.reflect import Reflections, reflect
from pmd.rollouts.batch import Batch
from pmd.rollouts.engine import Engine
from pmd.types import Rollout, Task


class ReflectionCallback(Callback):
    """Turns an epoch's groups into `latest`, the reflections on them. Silent once a frozen memory is built."""

    def __init__(
        self,
        engine: Engine,
        prompts: PromptFormat,
        tasks: Mapping[str, Task],
        config: ReflectionConfig,
        memory: ProceduralMemory,
        seed: int,
    ):
        self.engine, self.prompts, self.tasks = engine, prompts, tasks
        self.config, self.memory, self.seed = config, memory, seed
        self.groups: dict[str, list[Rollout]] = {}
        self.latest = Reflections((), 0, 0, 0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start an empty epoch."""
        self.groups = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Remember the batch's rollouts until the epoch ends."""
        for example in batch.examples:
            self.groups.setdefault(example.rollout.group_id, []).append(example.rollout)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reflect, unless the memory is frozen and built."""
        self.latest = Reflections((), 0, 0, 0)
        if not self.config.enabled or self.memory.is_closed(trainer.current_epoch):
            return
        started = time.perf_counter()
        key = f"{self.seed}/reflect/{trainer.current_epoch}"
        groups = list(self.groups.values())
        self.latest = reflect(
            self.engine, self.tasks, groups, self.prompts, self.config, key, self.memory.known_insights
        )
        pl_module.log_dict(
            {
                "reflect/num_prompts": float(self.latest.num_prompts),
                "reflect/num_insights": float(len(self.latest.drafts)),
                "reflect/malformed": float(self.latest.num_malformed),
                "reflect/rejected_items": float(self.latest.num_rejected),
                "reflect/retried": float(self.latest.num_retried),
                "reflect/unknown_targets": float(self.latest.num_unknown),
                "reflect/overlong": float(self.latest.num_overlong),
                "reflect/num_tokens": float(self.latest.num_tokens),
                "time/reflect_s": time.perf_counter() - started,
            },
            batch_size=1,
        )
