"""Audits and updates the memory at the end of each epoch, and saves it with every checkpoint.

A frozen memory is written once, before the first step, from one extra pass of the initial policy over the training
tasks, whose rollouts are counted; a frozen memory that was imported is never written.
"""

import csv
import hashlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from pmd.callbacks.checkpoint import data_of
from pmd.callbacks.completions import HasTables
from pmd.engines.base import Engine
from pmd.engines.parity import ParityCheck
from pmd.engines.shared import LeadingScorer
from pmd.errors import DiskError, MemoryStoreError
from pmd.memory import EpochRecord, MemoryUpdate, ProceduralMemory, evolve_memory
from pmd.memory.audit import ShownGroup, audit, choose_groups
from pmd.memory.behaviour_writer import Written
from pmd.memory.behaviours import describe_absence
from pmd.memory.pending import decode, encode
from pmd.memory.reflect import Reflector
from pmd.memory.stream import MemoryUpdater
from pmd.module import PMDModule
from pmd.scoring import PolicyScorer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Auditor:
    """What audits need besides the memory. The trainer's model scores, so the engine sleeps meanwhile."""

    engine: Engine
    scorer: PolicyScorer | LeadingScorer
    max_prompt_tokens: int
    parity: ParityCheck | None


class MemoryCallback(Callback):
    """Updates the memory from the epoch's record, logs its health, and saves it with checkpoints."""

    def __init__(
        self,
        record: EpochRecord,
        memory: ProceduralMemory,
        reflector: Reflector,
        items: Path,
        auditor: Auditor | None = None,
    ):
        self.record, self.memory, self.reflector = record, memory, reflector
        self.items = items  # folder of the item tables
        self.auditor = auditor

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build a frozen memory before the first step."""
        if not self.memory.config.frozen or self.memory.is_closed:
            return
        data = data_of(trainer)
        attempted, costs = data.first_pass(self.reflector.engine)
        updater = MemoryUpdater(self.record, self.memory, self.reflector)
        figures = costs | updater.update(attempted, 0, data.steps_per_epoch, data.engine.policy_version)
        if problem := self.record.reflected.describe_failure(self.reflector.config):
            log.warning("before the first step: %s", problem)
        self._warn("before the first step")
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=0)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Audit what teachers were shown, update the memory, log its health.

        An epoch that is not complete, because the run ends within it, is updated from when the run is resumed.
        """
        assert isinstance(pl_module, PMDModule)
        if not self.record.is_complete:
            return
        is_due = self.memory.config.update == "epoch"
        if is_due and self.auditor is not None and not self.memory.is_closed:
            self._audit(self.auditor, trainer, pl_module)
        started, version, figures = time.perf_counter(), pl_module.policy_version, self._epoch_figures()
        if is_due:
            update = evolve_memory(self.record, self.memory, self._abstract, version)
            figures |= update.figures(self.record.reflections) | self._audit_figures(update)
            figures |= self.reflector.figures_of(update.written)
            self.record.clear(update)
        store = self.memory.store
        counts = store.stats() | store.health(version) | self._recall()
        pl_module.log_dict(figures | {f"memory/{name}": float(value) for name, value in counts.items()}, batch_size=1)
        if not self.memory.is_closed:
            self._warn(f"epoch {self.record.epoch}")
        self._log_items(trainer, store.item_table(version))
        self.record.start(self.record.epoch + 1)
        pl_module.log("time/memory_s", time.perf_counter() - started, batch_size=1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the writer's connections."""
        if self.reflector.writer is not None:
            self.reflector.writer.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the whole store, and what awaits its next update, so that a checkpoint is complete by itself."""
        data = self.memory.snapshot()
        state = {
            "generation": self.memory.generation,
            "database": _tensor(data),
            "sha256": hashlib.sha256(data).hexdigest(),  # torch loads a checkpoint with flipped bits without complaint
        }
        if self.record.groups or self.record.num_groups or self.record.num_steps:
            state["record"] = _tensor(encode(self.record))
        return state

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
        if "record" in state_dict:
            decode(state_dict["record"].numpy().tobytes(), self.record, self.reflector.tasks)

    def _abstract(self, clusters: Sequence[Sequence[str]]) -> Written:
        return self.reflector.abstract(clusters, str(self.record.epoch), self.record.num_steps)

    def _warn(self, when: str) -> None:
        """Say what kept behaviours out of the memory in this epoch, if anything did."""
        written = self.record.written
        problems = [describe_absence(self.memory.store, self.memory.config, written.texts.count(None))]
        if self.reflector.writer is not None:
            problems.append(written.describe_problem())
        for problem in filter(None, problems):
            log.warning("%s: %s", when, problem)

    def _audit(self, auditor: Auditor, trainer: Trainer, module: PMDModule) -> None:
        """Have the teacher score attempts with and without the items it was shown."""
        started, groups = time.perf_counter(), []
        for group in self.record.groups.values():
            past = self.memory.past_success(group.task)
            past_ids = module.tokenizer.encode(past, add_special_tokens=False) if past is not None else []
            audited = tuple(item for item in group.items if item.level > 0)
            groups.append(ShownGroup(group.step, group.task, tuple(group.rollouts), audited, tuple(past_ids)))
        chosen = choose_groups(groups, self.memory.config, f"{self.reflector.seed}/audit/{self.record.epoch}")
        auditor.engine.sleep()
        found = audit(chosen, auditor.scorer, self.reflector.prompts, module.tokenizer, auditor.max_prompt_tokens)
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

    def _epoch_figures(self) -> dict[str, float]:
        """Return the metrics of this epoch's retrieval."""
        return {"memory/hit_rate": self.record.hit_rate, "memory/teacher_tokens": float(self.record.num_memory_tokens)}

    def _recall(self) -> dict[str, float]:
        recall = self.memory.index.recall(10)
        return {} if recall is None else {"recall_at_10": recall}

    def _audit_figures(self, update: MemoryUpdate) -> dict[str, float]:
        if self.auditor is None:
            return {}
        statuses = ("active", "internalized", "retired", "quarantined")
        return {f"memory/audits_made_{status}": float(update.changed_by_audits.get(status, 0)) for status in statuses}

    def _log_items(self, trainer: Trainer, rows: list[dict[str, Any]]) -> None:
        """Save the epoch's table of items as a file of the run, and as a table of loggers such as Weights & Biases."""
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
        data, step = [list(row.values()) for row in rows], max(trainer.global_step - 1, 0)
        for logger in trainer.loggers:
            if isinstance(logger, HasTables):
                logger.log_table("memory/items", columns=list(rows[0]), data=data, step=step)


def _tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
