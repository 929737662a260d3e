"""At the end of an epoch what was learnt is written to memory; the memory travels inside every checkpoint.

Runs after `ReflectionCallback` and `AuditCallback`. Writes SQLite first, then the index is rebuilt from it, then the
generation has moved. A frozen memory is written once, from the rollouts of the first epoch (our choice: the same
rollouts and updates as every other method), and never again; one that was imported is never written.
"""

import csv
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from pmd.callbacks.audit import AuditCallback
from pmd.callbacks.reflect import ReflectionCallback
from pmd.errors import MemoryStoreError
from pmd.memory.health import health, item_table
from pmd.memory.memory import Learnt, ProceduralMemory
from pmd.module import PMDModule
from pmd.reflection.reflect import abstract
from pmd.rollouts.batch import Batch


class MemoryUpdateCallback(Callback):
    """Writes the epoch into memory, says how the memory does, and carries it through checkpoints."""

    def __init__(
        self, memory: ProceduralMemory, reflection: ReflectionCallback, audits: AuditCallback | None, items: Path
    ):
        self.memory = memory
        self.reflection = reflection
        self.audits = audits
        self.items = items  # folder of the tables of items
        self.num_groups, self.num_hits, self.num_tokens = 0, 0, 0  # of this epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count anew."""
        self.num_groups, self.num_hits, self.num_tokens = 0, 0, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Note which items each group's teacher was shown; written with the epoch."""
        contexts = {example.rollout.group_id: example.context for example in batch.examples}
        for group_id, context in contexts.items():
            if context.procedures or context.dropped:
                self.memory.log_retrievals(batch.step, group_id, context.procedures, context.dropped)
        self.num_groups += len(contexts)
        self.num_hits += sum(bool(context.procedures) for context in contexts.values())
        for example in batch.examples:
            if example.context.procedures:
                self.num_tokens += len(example.context.prompt_ids) - len(example.rollout.prompt_ids)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write experiences, insights and behaviours; refresh index and retrieval; log how the memory does."""
        assert isinstance(pl_module, PMDModule)
        started, learnt = time.perf_counter(), Learnt(0, 0, 0, {})
        if not self.memory.is_closed(trainer.current_epoch):
            rollouts = [rollout for group in self.reflection.groups.values() for rollout in group]
            learnt = self.memory.learn(
                self.reflection.tasks,
                rollouts,
                self.reflection.latest.drafts,
                lambda clusters: self._abstract(clusters, trainer.current_epoch),
                pl_module.policy_version,
                self.audits.latest.audits if self.audits is not None else (),
            )
        store, version = self.memory.store, pl_module.policy_version
        figures = store.stats() | health(store, self.memory.index, version) | self._of_epoch(learnt)
        pl_module.log_dict({f"memory/{name}": float(value) for name, value in figures.items()}, batch_size=1)
        self._log_items(trainer, item_table(store, version))
        pl_module.log("time/memory_s", time.perf_counter() - started, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole store, so that a checkpoint is one thing."""
        data = self.memory.snapshot()
        return {
            "generation": self.memory.generation,
            "database": torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()),
            "sha256": hashlib.sha256(data).hexdigest(),  # torch loads a checkpoint with flipped bits as it is
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the checkpoint's memory in place of whatever the run directory holds.

        Raises:
            MemoryStoreError: the checkpoint is damaged; the run directory's memory stays.
        """
        data = state_dict["database"].numpy().tobytes()
        if state_dict.get("sha256") not in (None, hashlib.sha256(data).hexdigest()):  # earlier checkpoints have none
            raise MemoryStoreError(
                "the checkpoint's memory is damaged (its bytes are not those of its sha256); resume from another "
                "checkpoint of the run with --ckpt_path=FILE."
            )
        self.memory.restore(data)

    def _of_epoch(self, learnt: Learnt) -> dict[str, float]:
        """Return what this epoch's retrieval and update did."""
        reflected = self.reflection.latest
        figures: dict[str, float] = {
            "hit_rate": self.num_hits / max(1, self.num_groups),
            "teacher_tokens": self.num_tokens,
            "malformed_behaviours": learnt.num_wordless,
            "parse_failure_rate": reflected.num_malformed / max(1, reflected.num_prompts),
            "refused_drafts": learnt.num_refused,
            "merged": learnt.num_merged,
        }
        if self.audits is not None:
            for status in ("active", "absorbed", "retired", "quarantined"):
                figures[f"audits_made_{status}"] = learnt.changed_by_audits.get(status, 0)
        return figures

    def _log_items(self, trainer: Trainer, rows: list[dict[str, Any]]) -> None:
        """Keep the epoch's table of items: a file of the run, and a table in Weights & Biases."""
        if not rows:
            return
        self.items.mkdir(parents=True, exist_ok=True)
        with (self.items / f"epoch-{trainer.current_epoch:03d}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("memory/items", columns=list(rows[0]), data=[list(row.values()) for row in rows])

    def _abstract(self, clusters: Sequence[Sequence[str]], epoch: int) -> list[str | None]:
        part = self.reflection
        return abstract(part.engine, clusters, part.prompts, part.config, f"{part.seed}/abstract/{epoch}")
