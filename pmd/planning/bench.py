"""Where the time of a training step goes, and the most memory it takes.

Enters: a module and a stream of batches (synthetic, or the run's own). Leaves: one record per step, in seconds, and
figures derived from them. The steps run under Lightning's Trainer, as in training.
"""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from pmd.batch import Batch, BatchLayout
from pmd.module import PMDModule
from pmd.planning.flops import device_peak, step_flops

#: The parts of a step, in the order in which they happen.
PARTS = (
    *("rollout", "verify", "context", "sleep", "teacher", "initial", "student", "backward", "optimizer"),
    *("wake", "sync", "parity"),
)
#: Those that the engine's callback takes, and those in which the models train.
ENGINE_PARTS = ("sleep", "wake", "sync", "parity")
TRAINING_PARTS = ("teacher", "initial", "student", "backward", "optimizer")


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Real tokens that the models are given in one step: a shared prompt counts once."""

    student: int
    teacher: int
    completion: int
    sequences: int  # prompt and completion of every rollout: what has been trained on


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step."""

    seconds: dict[str, float]  # by part; `other` is what no part accounts for
    total_s: float
    cpu_s: float
    tokens: TokenCounts
    loss: float


class StepClock(Callback):
    """Records every step. A step begins where the one before it ended, so it holds its own rollouts."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.started = (0.0, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.started = time.perf_counter(), time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Record the step and start the next."""
        assert isinstance(pl_module, PMDModule)
        now = time.perf_counter(), time.process_time()
        engine = {f"time/{part}_s" for part in ENGINE_PARTS}
        engine_s = {name: float(value) for name, value in trainer.callback_metrics.items() if name in engine}
        known = batch.metrics | dict(pl_module.seconds) | engine_s
        seconds = {part: known[f"time/{part}_s"] for part in PARTS if f"time/{part}_s" in known}
        total = now[0] - self.started[0]
        seconds["other"] = total - sum(seconds.values())
        tokens = count_tokens(batch, pl_module.layout)
        loss = float(trainer.callback_metrics["loss/total"])
        self.records.append(StepRecord(seconds, total, now[1] - self.started[1], tokens, loss))
        self.started = time.perf_counter(), time.process_time()


def measure_steps(
    module: PMDModule,
    data: IterableDataset | LightningDataModule,
    steps: int,
    accelerator: str,
    callbacks: Sequence[Callback] = (),
) -> list[StepRecord]:
    """Take `steps` optimizer steps and return their records; the weights move."""
    clock = StepClock()
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=steps,
        limit_val_batches=0,
        accelerator=accelerator,
        devices=1,
        callbacks=[*callbacks, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(data, batch_size=None) if isinstance(data, IterableDataset) else data
    trainer.fit(module, loader)
    return clock.records


def count_tokens(batch: Batch, layout: BatchLayout) -> TokenCounts:
    """Count what the student and the teacher are given."""
    given = {"student": 0, "teacher": 0}
    for micro_batch in batch.micro_batches(layout, torch.device("cpu")):
        for side, sequences in (("student", micro_batch.student), ("teacher", micro_batch.teacher)):
            given[side] += sequences.num_real_tokens
    completion = sum(len(e.completion_ids) for e in batch.examples)
    return TokenCounts(**given, completion=completion, sequences=completion + sum(_prompts(batch)))


def _prompts(batch: Batch) -> list[int]:
    return [len(e.rollout.prompt_ids) for e in batch.examples]


def summarise(module: PMDModule, records: Sequence[StepRecord]) -> dict[str, Any]:
    """Average the steps after the first, which warms up; add speed, model FLOPs utilisation and peak memory."""
    measured = records[1:] or records
    parts = {p: sum(r.seconds.get(p, 0.0) for r in measured) / len(measured) for p in [*PARTS, "other"]}
    total = sum(r.total_s for r in measured)
    training = sum(sum(r.seconds.get(p, 0.0) for p in TRAINING_PARTS) for r in measured)
    flops = sum(step_flops(module, r.tokens.student, r.tokens.teacher, r.tokens.completion) for r in measured)
    name, peak = device_peak(module.device)
    return {
        "device": name,
        "steps": len(measured),
        "seconds": {part: round(value, 4) for part, value in parts.items() if value},
        "step_s": total / len(measured),
        "cpu_s": sum(r.cpu_s for r in measured) / len(measured),
        "tokens_per_step": sum(r.tokens.sequences for r in measured) / len(measured),
        "tokens_per_s": sum(r.tokens.sequences for r in measured) / total,
        "training_tokens_per_s": sum(r.tokens.sequences for r in measured) / training,
        "tflops_per_s": flops / training / 1e12,
        "mfu": None if peak is None else flops / training / peak,
        "peak_memory_gb": peak_memory_bytes(module.device) / 1e9,
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory of the device that torch held, or of this process where there is no device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
