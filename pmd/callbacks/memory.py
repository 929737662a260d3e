"""At the end of an epoch what was learnt is written to memory; the memory travels inside every checkpoint.

Runs after `ReflectionCallback`. Writes SQLite first, then the index is rebuilt from it, then the generation has moved.
A frozen memory is written once, from the rollouts of the first epoch (our choice: the same rollouts and updates as
every other method), and never again.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from pmd.callbacks.reflect import ReflectionCallback
from pmd.memory.memory import ProceduralMemory
from pmd.module import PMDModule
from pmd.reflection.reflect import abstract
from pmd.rollouts.batch import Batch


class MemoryUpdateCallback(Callback):
    """Writes the epoch into memory and carries the memory through checkpoints."""

    def __init__(self, memory: ProceduralMemory, reflection: ReflectionCallback):
        self.memory = memory
        self.reflection = reflection

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Note which items each group's teacher was shown; written with the epoch."""
        shown = {e.rollout.group_id: e.context.procedures for e in batch.examples if e.context.procedures}
        for group_id, procedures in shown.items():
            self.memory.log_retrievals(batch.step, group_id, procedures)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write experiences, insights and behaviours; refresh index and retrieval."""
        assert isinstance(pl_module, PMDModule)
        started, malformed = time.perf_counter(), 0
        if not (self.memory.config.frozen and trainer.current_epoch > 0):
            rollouts = [rollout for group in self.reflection.groups.values() for rollout in group]
            malformed = self.memory.learn(
                self.reflection.tasks,
                rollouts,
                self.reflection.latest.drafts,
                lambda clusters: self._abstract(clusters, trainer.current_epoch),
                pl_module.policy_version,
            )
        stats = {f"memory/{name}": float(value) for name, value in self.memory.store.stats().items()}
        seconds = time.perf_counter() - started
        pl_module.log_dict(
            stats | {"memory/malformed_behaviours": float(malformed), "time/memory_s": seconds}, batch_size=1
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the whole store, so that a checkpoint is one thing."""
        database = np.frombuffer(self.memory.snapshot(), dtype=np.uint8).copy()
        return {"generation": self.memory.generation, "database": torch.from_numpy(database)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the checkpoint's memory in place of whatever the run directory holds."""
        self.memory.restore(state_dict["database"].numpy().tobytes())

    def _abstract(self, clusters: Sequence[Sequence[str]], epoch: int) -> list[str | None]:
        part = self.reflection
        return abstract(part.engine, clusters, part.prompts, part.config, f"{part.seed}/abstract/{epoch}")
