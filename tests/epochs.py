"""Hand-made epochs: what the callbacks would have recorded."""

from collections.abc import Iterable, Mapping

from pmd.memory import EpochRecord, GroupRecord, ProceduralMemory
from pmd.memory.behaviour_writer import Written
from pmd.memory.reflect import Reflections
from pmd.types import InsightChange, Rollout, Task


def make_epoch(
    memory: ProceduralMemory,
    tasks: Mapping[str, Task],
    rollouts: Iterable[Rollout],
    changes: Iterable[InsightChange] = (),
    epoch: int = 0,
) -> EpochRecord:
    """Return the record of an epoch with these rollouts, whose teachers were shown nothing."""
    record = EpochRecord(epoch, reflections=Reflections(tuple(changes)))
    for rollout in rollouts:
        empty = GroupRecord(0, tasks[rollout.task_id], [], (), (), memory.generation)
        record.groups.setdefault(rollout.group_id, empty).rollouts.append(rollout)
    return record


def no_behaviours(clusters):
    """Put no cluster into words."""
    return Written([None] * len(clusters))
