"""Measures training steps: time by part, throughput and peak memory.

The steps run under Lightning's Trainer, as in training, on synthetic batches or on those of a run.
"""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from pmd.batch import Batch, BatchLayout
from pmd.module import PMDModule
from pmd.planning.flops import device_peak, step_flops

#: The parts of a step, in the order in which they happen.
PARTS = (
    *("rollout", "verify", "context", "sleep", "teacher", "reference", "student", "backward", "optimizer"),
    *("wake", "sync", "parity"),
)
#: The parts that the sync callback times, and those in which the models are trained.
ENGINE_PARTS = ("sleep", "wake", "sync", "parity")
TRAINING_PARTS = ("teacher", "reference", "student", "backward", "optimizer")


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Tokens of one step, without padding. Those of student and teacher count a shared prompt once."""

    student: int
    teacher: int
    completion: int
    sequences: int  # prompts and completions of all rollouts: the tokens trained on


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step."""

    seconds: dict[str, float]  # by part; `other` is the rest
    total_s: float
    cpu_s: float
    tokens: TokenCounts
    flops: float
    loss: float


@dataclass(slots=True)
class Measurement:
    """The measured optimizer steps, and the device on which they ran."""

    steps: list[StepRecord] = field(default_factory=list)
    device: str = ""
    peak_flops_per_s: float | None = None  # of the device in bfloat16, if known
    peak_memory_bytes: int = 0
    reserved_memory_bytes: int | None = None  # by torch's allocator, at its peak; None without a GPU


class StepClock(Callback):
    """Measures every step. A step begins where the previous one ended, so it includes its own rollouts."""

    def __init__(self) -> None:
        self.measured = Measurement()
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
        total_s = now[0] - self.started[0]
        seconds["other"] = total_s - sum(seconds.values())
        tokens = count_tokens(batch, pl_module.layout)
        flops = step_flops(pl_module, tokens.student, tokens.teacher, tokens.completion)
        loss = float(trainer.callback_metrics["loss/total"])
        self.measured.steps.append(StepRecord(seconds, total_s, now[1] - self.started[1], tokens, flops, loss))
        self.started = time.perf_counter(), time.process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the device's figures now, because Lightning's teardown moves the module to the CPU."""
        self.measured.device, self.measured.peak_flops_per_s = device_peak(pl_module.device)
        self.measured.peak_memory_bytes = peak_memory_bytes(pl_module.device)
        if pl_module.device.type == "cuda":
            self.measured.reserved_memory_bytes = torch.cuda.max_memory_reserved(pl_module.device)


def measure_steps(
    module: PMDModule,
    data: IterableDataset | LightningDataModule,
    steps: int,
    accelerator: str,
    callbacks: Sequence[Callback] = (),
    precision: Any = None,
) -> Measurement:
    """Take `steps` optimizer steps and return their measurement; the weights change.

    Args:
        accelerator: Lightning's, as `precision`.
    """
    clock = StepClock()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # what building the model took is not a step's
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=steps,
        limit_val_batches=0,
        accelerator=accelerator,
        precision=precision,
        devices=1,
        callbacks=[*callbacks, clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(data, batch_size=None) if isinstance(data, IterableDataset) else data
    trainer.fit(module, loader)
    return clock.measured


def count_tokens(batch: Batch, layout: BatchLayout) -> TokenCounts:
    """Count the tokens that the student and the teacher are given."""
    counts = {"student": 0, "teacher": 0}
    for micro_batch in batch.micro_batches(layout, torch.device("cpu")):
        for side, sequences in (("student", micro_batch.student), ("teacher", micro_batch.teacher)):
            counts[side] += sequences.num_real_tokens
    prompt = sum(len(example.rollout.prompt_ids) for example in batch.examples)
    completion = sum(len(example.completion_ids) for example in batch.examples)
    return TokenCounts(**counts, completion=completion, sequences=prompt + completion)


def summarise(measured: Measurement) -> dict[str, Any]:
    """Average the steps after the first, which warms up; add speed, model FLOPs utilisation and peak memory."""
    steps = measured.steps[1:] or measured.steps
    seconds = {p: sum(s.seconds.get(p, 0.0) for s in steps) / len(steps) for p in [*PARTS, "other"]}
    total_s = sum(s.total_s for s in steps)
    training_s = sum(s.seconds.get(part, 0.0) for s in steps for part in TRAINING_PARTS)
    num_tokens = sum(s.tokens.sequences for s in steps)
    flops_per_s, peak = sum(s.flops for s in steps) / training_s, measured.peak_flops_per_s
    rollout_s = sum(s.seconds.get("rollout", 0.0) for s in steps)
    reserved = measured.reserved_memory_bytes
    return {
        "device": measured.device,
        "steps": len(steps),
        "seconds": {part: round(value, 4) for part, value in seconds.items() if value},
        "step_s": total_s / len(steps),
        "cpu_s": sum(s.cpu_s for s in steps) / len(steps),
        "tokens_per_step": num_tokens / len(steps),
        "tokens_per_s": num_tokens / total_s,
        "training_tokens_per_s": num_tokens / training_s,
        "rollout_tokens_per_s": sum(s.tokens.completion for s in steps) / rollout_s if rollout_s else None,
        "tflops_per_s": flops_per_s / 1e12,
        "mfu": None if peak is None else flops_per_s / peak,
        "peak_memory_gb": measured.peak_memory_bytes / 1e9,
        "reserved_memory_gb": None if reserved is None else reserved / 1e9,
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak GPU memory allocated by torch, or without a GPU the peak memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
