"""The per-token record of one training step, kept so that any rollout of the run can be inspected.

One gzipped JSONL file per step, one line per rollout: the token ids of the prompts and the completion, memory items,
verdict, versions, and for each completion token the divergence and both log-probs. `pmd inspect step` shows it.
"""

import gzip
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pmd.batch import Batch, Example, MicroBatch
from pmd.losses.distillation import TokenTerms

PER_TOKEN = ("per_token_divergence", "student_logprobs", "teacher_logprobs", "entropy")


class StepTrace:
    """Collects the records of one step, micro-batch by micro-batch."""

    def __init__(self, batch: Batch):
        self.epoch, self.step = batch.epoch, batch.step
        self.records: list[dict[str, Any]] = []

    def add(self, micro_batch: MicroBatch, terms: TokenTerms) -> None:
        """Split per-token values [N] by rollout and record them."""
        per_token = {name: value for name in PER_TOKEN if (value := getattr(terms, name)) is not None}
        lengths = [len(example.completion_ids) for example in micro_batch.examples]
        columns = {name: torch.split(values.detach().float().cpu(), lengths) for name, values in per_token.items()}
        for row, example in enumerate(micro_batch.examples):
            values = {name: [round(v, 6) for v in parts[row].tolist()] for name, parts in columns.items()}
            self.records.append(_describe(example) | values)

    def write(self, folder: Path) -> Path:
        """Write `step-NNNNNN.jsonl.gz` to `folder`, completely or not at all, and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = trace_path(folder, self.step)
        part = path.with_suffix(".part")
        with gzip.open(part, "wt", encoding="utf-8", compresslevel=3) as file:
            for record in self.records:
                file.write(json.dumps({"epoch": self.epoch, "step": self.step} | record) + "\n")
        os.replace(part, path)
        return path


def trace_path(folder: Path, step: int) -> Path:
    """Return the path of the trace of `step`."""
    return folder / f"step-{step:06d}.jsonl.gz"


def read_trace(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of one step."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _describe(example: Example) -> dict[str, Any]:
    rollout, context = example.rollout, example.context
    verdict, completion = rollout.verdict, rollout.completion
    return {
        "rollout_id": rollout.rollout_id,
        "task_id": rollout.task_id,
        "policy_version": completion.policy_version,
        "memory_generation": context.memory_generation,
        "reward": verdict.reward,
        "status": verdict.status,
        "feedback": verdict.feedback,
        "explanation": verdict.explanation,
        "advantage": example.advantage,
        "finish_reason": completion.finish_reason,
        "memory": [
            {"id": i.item_id, "level": i.level, "kind": i.kind, "text": i.text, "similarity": i.similarity}
            for i in context.items
        ],
        "success_shown": context.success,
        "failure_shown": context.shows_failure,
        "items_dropped": context.num_dropped,
        "attempt_dropped": context.attempt_dropped,
        "student_prompt_ids": rollout.prompt_ids,
        "teacher_prompt_ids": context.prompt_ids,
        "completion_ids": completion.token_ids,
    }
