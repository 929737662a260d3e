"""Writes tables of completions to read, for every traced step and every evaluation.

To `completions/` in the run directory, and to every logger of the trainer that has tables. A step's table holds prompt,
completion, verdict, what the teacher saw and the divergence; an evaluation's has no teacher.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger

from pmd.batch import Batch, Example
from pmd.module import PMDModule
from pmd.types import Rollout

MAX_ROWS = 32  # in a logger's table; the file holds all
NAME = "completions"


@runtime_checkable
class HasTables(Protocol):
    """A logger that takes tables as Lightning's WandbLogger does; one of a user's own may, too."""

    def log_table(self, key: str, columns: list[str], data: list[list[Any]], step: int | None = None) -> None:
        """Log the rows `data` under the name `key`."""
        ...


class CompletionsCallback(Callback):
    """Writes the tables of the steps for which the module keeps a trace; it acts after the trace is complete."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Write the step's table."""
        assert isinstance(pl_module, PMDModule)
        if pl_module.trace is None or not trainer.is_global_zero:  # the first of several processes has all traces
            return
        traced = {record["rollout_id"]: record for record in pl_module.trace.records}
        rows = [
            describe(example, traced[example.rollout.rollout_id], pl_module.tokenizer) | {"step": batch.step}
            for example in batch.examples
            if example.rollout.rollout_id in traced
        ]
        write_rows(self.folder / f"step-{batch.step:06d}.jsonl", rows)
        for logger in trainer.loggers:
            log_table(logger, NAME, rows[:MAX_ROWS], batch.step)


@dataclass(frozen=True, slots=True)
class EvaluationTables:
    """Writes the tables of a run's evaluations."""

    folder: Path
    tokenizer: Any

    def write(self, name: str, rollouts: Mapping[bool, Iterable[Rollout]], step: int) -> list[dict[str, Any]]:
        """Write `NAME.jsonl` and return its rows.

        Args:
            rollouts: without and, under True, with memory in the prompt.
        """
        rows = [
            describe_rollout(rollout, self.tokenizer) | {"memory_in_prompt": with_memory, "step": step}
            for with_memory, own in rollouts.items()
            for rollout in own
        ]
        write_rows(self.folder / f"{name}.jsonl", rows)
        return rows


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def describe(example: Example, record: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return one row of a step's table."""
    context, divergence = example.context, record.get("per_token_divergence")
    return describe_rollout(example.rollout, tokenizer) | {
        "teacher_memory": "\n".join(item.text for item in context.items),
        "teacher_attempt": context.success or ("its own failure" if context.shows_failure else ""),
        "mean_divergence": sum(divergence) / len(divergence) if divergence else None,
    }


def describe_rollout(rollout: Rollout, tokenizer: Any) -> dict[str, Any]:
    """Return what every table says of a rollout."""
    return {
        "task_id": rollout.task_id,
        "rollout_id": rollout.rollout_id,
        "prompt": str(tokenizer.decode(list(rollout.prompt_ids))),
        "completion": rollout.completion.text,
        "status": rollout.verdict.status,
        "reward": rollout.verdict.reward,
        "feedback": rollout.verdict.feedback,
    }


def log_table(logger: Logger, name: str, rows: list[dict[str, Any]], step: int) -> None:
    """Write rows to a logger that has tables; others are left alone."""
    if not rows:
        return
    columns = list(rows[0])
    if isinstance(logger, HasTables):
        logger.log_table(name, columns=columns, data=[list(row.values()) for row in rows], step=step)
    elif isinstance(logger, MLFlowLogger):
        data = {column: [row[column] for row in rows] for column in columns}
        logger.experiment.log_table(logger.run_id, data, f"{name}/step-{step:06d}.json")
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(name, markdown(rows), step)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return rows as a table that TensorBoard shows."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([_cell(row[column]) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")
