"""Keeps what no update has written to the memory yet in a checkpoint: the record of an epoch that is not over.

Texts, token ids and numbers survive exactly; log-probs, which the memory does not use, are left out.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from pmd.memory import EpochRecord, GroupRecord
from pmd.memory.behaviour_writer import Written
from pmd.memory.reflect import Reflections
from pmd.types import CaseCounts, Completion, MemoryItem, Rollout, Task, Verdict

COUNTS = ("epoch", "num_groups", "num_hits", "num_memory_tokens", "num_steps")


def encode(record: EpochRecord) -> bytes:
    """Return the groups and counts of a record; its reflections and audits belong to an update in progress."""
    groups = [_plain_group(group_id, group) for group_id, group in record.groups.items()]
    values = {name: getattr(record, name) for name in COUNTS} | {"groups": groups}
    values |= {"reflected": asdict(record.reflected), "written": asdict(record.written)}
    return zlib.compress(json.dumps(values).encode("ascii"), 1)


def decode(data: bytes, record: EpochRecord, tasks: Mapping[str, Task]) -> None:
    """Put what `encode` kept into a record."""
    values = json.loads(zlib.decompress(data))
    for name in COUNTS:
        setattr(record, name, values.get(name, 0))  # earlier checkpoints lack the newer ones
    record.reflected = Reflections(**values.get("reflected", {}) | {"changes": ()})
    record.written = Written(**values.get("written", {}))
    record.groups = {group["group_id"]: _group(group, tasks) for group in values["groups"]}


def _plain_group(group_id: str, group: GroupRecord) -> dict[str, Any]:
    return {
        "group_id": group_id,
        "step": group.step,
        "task_id": group.task.task_id,
        "rollouts": [_plain_rollout(rollout) for rollout in group.rollouts],
        "items": [asdict(item) for item in group.items],
        "dropped": [asdict(item) for item in group.dropped],
        "memory_generation": group.memory_generation,
    }


def _plain_rollout(rollout: Rollout) -> dict[str, Any]:
    values = asdict(rollout)
    values["completion"]["logprobs"] = ()
    return values


def _group(values: Mapping[str, Any], tasks: Mapping[str, Task]) -> GroupRecord:
    return GroupRecord(
        values["step"],
        tasks[values["task_id"]],
        [_rollout(each) for each in values["rollouts"]],
        tuple(MemoryItem(**item) for item in values["items"]),
        tuple(MemoryItem(**item) for item in values["dropped"]),
        values["memory_generation"],
    )


def _rollout(values: Mapping[str, Any]) -> Rollout:
    completion, verdict = values["completion"], values["verdict"]
    tests = CaseCounts(**verdict["tests"]) if verdict["tests"] is not None else None
    return Rollout(
        values["rollout_id"],
        values["group_id"],
        values["task_id"],
        tuple(values["prompt_ids"]),
        Completion(**completion | {"token_ids": tuple(completion["token_ids"]), "logprobs": ()}),
        Verdict(**verdict | {"tests": tests}),
    )
