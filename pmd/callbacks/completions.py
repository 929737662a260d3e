"""Writes a table of completions for every traced step: prompt, completion, verdict, what the teacher saw, divergence.

To `completions/step-N.jsonl` in the run directory, and to every logger of the trainer that has tables.
"""

import json
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from pmd.atomic import replace_text
from pmd.batch import Batch, Example
from pmd.module import PMDModule

MAX_ROWS = 32  # in a logger's table; the file holds all
NAME = "completions"


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
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        replace_text(self.folder / f"step-{batch.step:06d}.jsonl", lines)
        for logger in trainer.loggers:
            log_table(logger, rows[:MAX_ROWS], batch.step)


def describe(example: Example, record: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return one row of the table."""
    rollout, context = example.rollout, example.context
    divergence = record.get("per_token_divergence")
    return {
        "task_id": rollout.task_id,
        "rollout_id": rollout.rollout_id,
        "prompt": str(tokenizer.decode(list(rollout.prompt_ids))),
        "completion": rollout.completion.text,
        "status": rollout.verdict.status,
        "reward": rollout.verdict.reward,
        "feedback": rollout.verdict.feedback,
        "teacher_memory": "\n".join(item.text for item in context.items),
        "teacher_attempt": context.success or ("its own failure" if context.shows_failure else ""),
        "mean_divergence": sum(divergence) / len(divergence) if divergence else None,
    }


def log_table(logger: Logger, rows: list[dict[str, Any]], step: int) -> None:
    """Write rows to a logger that has tables; others are left alone."""
    if not rows:
        return
    columns = list(rows[0])
    if isinstance(logger, WandbLogger):
        logger.log_table(NAME, columns=columns, data=[list(row.values()) for row in rows], step=step)
    elif isinstance(logger, MLFlowLogger):
        data = {column: [row[column] for row in rows] for column in columns}
        logger.experiment.log_table(logger.run_id, data, f"{NAME}/step-{step:06d}.json")
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(NAME, markdown(rows), step)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return rows as a table that TensorBoard shows."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([_cell(row[column]) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", "<br>")
