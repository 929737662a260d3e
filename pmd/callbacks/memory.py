"""Audits and updates the memory at the end of each epoch, and saves it with every checkpoint.

A frozen memory is written once, from the rollouts of the first epoch (our choice: the same rollouts and updates as
every other method), and never again; a frozen memory that was imported is never written.
"""

import csv
import hashlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from pmd.config.schema import ReflectionConfig
from pmd.engines.base import Engine
from pmd.engines.parity import ParityCheck
from pmd.errors import DiskError, MemoryStoreError
from pmd.memory import EpochRecord, MemoryUpdate, ProceduralMemory, evolve_memory
from pmd.memory.audit import ShownGroup, audit, choose_groups
from pmd.memory.behaviour_writer import BehaviourWriter
from pmd.memory.behaviours import describe_absence
from pmd.memory.reflect import abstract
from pmd.module import PMDModule
from pmd.scoring import PolicyScorer
from pmd.tasks.prompts.base import PromptFormat

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Auditor:
    """What audits need besides the memory. The trainer's model scores, so the engine sleeps meanwhile."""

    engine: Engine
    scorer: PolicyScorer
    max_prompt_tokens: int
    parity: ParityCheck | None


class MemoryCallback(Callback):
    """Updates the memory from the epoch's record, logs its health, and saves it with checkpoints."""

    def __init__(
        self,
        record: EpochRecord,
        memory: ProceduralMemory,
        engine: Engine,
        prompts: PromptFormat,
        reflection: ReflectionConfig,
        seed: int,
        items: Path,
        auditor: Auditor | None = None,
        writer: BehaviourWriter | None = None,
    ):
        self.record, self.memory, self.engine, self.prompts = record, memory, engine, prompts
        self.reflection, self.seed = reflection, seed
        self.items = items  # folder of the item tables
        self.auditor = auditor
        self._written: dict[str, float] = {}  # what the writer did in the latest update
        self.writer = writer  # of behaviours; None: the policy writes them

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Audit what teachers were shown, update the memory, log its health."""
        assert isinstance(pl_module, PMDModule)
        if self.auditor is not None and not self.memory.is_closed(self.record.epoch):
            self._audit(self.auditor, trainer, pl_module)
        started, version = time.perf_counter(), pl_module.policy_version
        update = evolve_memory(self.record, self.memory, self._abstract, version)
        store = self.memory.store
        figures = store.stats() | store.health(version) | self._figures(update)
        pl_module.log_dict({f"memory/{name}": float(value) for name, value in figures.items()}, batch_size=1)
        if not self.memory.is_closed(self.record.epoch):
            problem = describe_absence(store, self.memory.config, update.num_malformed_behaviours)
            if problem:
                log.warning("epoch %d: %s", self.record.epoch, problem)
        self._log_items(trainer, store.item_table(version))
        pl_module.log("time/memory_s", time.perf_counter() - started, batch_size=1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the writer's connections."""
        if self.writer is not None:
            self.writer.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the whole store, so that a checkpoint is complete by itself."""
        data = self.memory.snapshot()
        return {
            "generation": self.memory.generation,
            "database": torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()),
            "sha256": hashlib.sha256(data).hexdigest(),  # torch loads a checkpoint with flipped bits without complaint
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the run directory's memory with the checkpoint's.

        Raises:
            MemoryStoreError: the checkpoint is damaged; the run directory's memory stays as it is.
        """
        data = state_dict["database"].numpy().tobytes()
        if state_dict.get("sha256") not in (None, hashlib.sha256(data).hexdigest()):  # earlier checkpoints have none
            raise MemoryStoreError(
                "the checkpoint's memory is damaged (its bytes are not those of its sha256); resume from another "
                "checkpoint of the run with --ckpt_path=FILE."
            )
        self.memory.restore(data)

    def _abstract(self, clusters: Any) -> list[str | None]:
        if self.writer is not None:
            return self._ask_writer(self.writer, clusters)
        key = f"{self.seed}/abstract/{self.record.epoch}"
        return abstract(self.engine, clusters, self.prompts, self.reflection, key)

    def _ask_writer(self, writer: BehaviourWriter, clusters: Any) -> list[str | None]:
        written = writer.write(clusters, len({group.step for group in self.record.groups.values()}))
        self._written = {
            "behaviour_calls": written.num_calls,
            "behaviour_calls_failed": written.num_failed,
            "behaviours_deferred": written.num_deferred,
        }
        if problem := written.describe_problem():
            log.warning("epoch %d: %s", self.record.epoch, problem)
        return written.texts

    def _audit(self, auditor: Auditor, trainer: Trainer, module: PMDModule) -> None:
        """Have the teacher score attempts with and without the items it was shown."""
        started, groups = time.perf_counter(), []
        for group in self.record.groups.values():
            past = self.memory.past_success(group.task)
            past_ids = module.tokenizer.encode(past, add_special_tokens=False) if past is not None else []
            audited = tuple(item for item in group.items if item.level > 0)
            groups.append(ShownGroup(group.step, group.task, tuple(group.rollouts), audited, tuple(past_ids)))
        chosen = choose_groups(groups, self.memory.config, f"{self.seed}/audit/{self.record.epoch}")
        auditor.engine.sleep()
        found = audit(chosen, auditor.scorer, self.prompts, module.tokenizer, auditor.max_prompt_tokens)
        auditor.engine.wake()
        if auditor.parity is not None:
            auditor.parity.measure(trainer.precision_plugin.forward_context())
        self.record.audits = found.audits
        figures = {
            "audit/num_audits": float(len(found.audits)),
            "audit/num_scored_tokens": float(found.num_tokens),
            "time/audit_s": time.perf_counter() - started,
        }
        module.log_dict(figures, batch_size=1)

    def _figures(self, update: MemoryUpdate) -> dict[str, float]:
        """Return the metrics of this epoch's retrieval and update."""
        reflections = self.record.reflections
        figures: dict[str, float] = {
            "hit_rate": self.record.hit_rate,
            "teacher_tokens": self.record.num_memory_tokens,
            "malformed_behaviours": update.num_malformed_behaviours,
            "parse_failure_rate": reflections.num_malformed / max(1, reflections.num_prompts),
            "refused_changes": update.num_refused,
            "merged": update.num_merged,
        }
        if self.writer is not None:
            figures |= self._written
        recall = self.memory.index.recall(10)
        if recall is not None:
            figures["recall_at_10"] = recall
        if self.auditor is not None:
            for status in ("active", "internalized", "retired", "quarantined"):
                figures[f"audits_made_{status}"] = update.changed_by_audits.get(status, 0)
        return figures

    def _log_items(self, trainer: Trainer, rows: list[dict[str, Any]]) -> None:
        """Save the epoch's table of items as a file of the run, and as a table in Weights & Biases."""
        if not rows:
            return
        path = self.items / f"epoch-{trainer.current_epoch:03d}.csv"
        try:
            self.items.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        except OSError as error:
            raise DiskError(
                f"table of memory items={path} could not be written ({error.strerror}); the last checkpoint is kept: "
                "free space and resume."
            ) from error
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("memory/items", columns=list(rows[0]), data=[list(row.values()) for row in rows])
