"""Updates the memory with each rollout batch, before the prompts of its teachers are made (`memory.update: batch`).

So what a batch teaches already conditions the teachers of that batch, as in the paper. An update writes the rollouts of
its own batch, and logs what the teachers of the batch before were shown; `evolve_memory` is the same as at an epoch's
end. A frozen memory is built here too, from one pass of the initial policy.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from pmd.memory import EpochRecord, GroupRecord, ProceduralMemory, evolve_memory
from pmd.memory.reflect import Reflector
from pmd.types import Rollout


@dataclass(frozen=True, slots=True)
class MemoryUpdater:
    """Reflects on groups of verified rollouts as they come, and updates the memory at once."""

    record: EpochRecord
    memory: ProceduralMemory
    reflector: Reflector

    def update(
        self, groups: Sequence[Sequence[Rollout]], step: int, num_steps: int, policy_version: int
    ) -> dict[str, float]:
        """Write what these groups teach, all or nothing, and what has been shown since the last update; return metrics.

        Args:
            step: optimizer step of the run before which the update happens; seeds are derived from it.
            num_steps: optimizer steps that these groups are for.

        Raises:
            MemoryStoreError: a task is not in the training split, or the store cannot be written.
        """
        if self.memory.is_closed:
            return {}
        started, record = time.perf_counter(), self.record
        scored = [own for group in groups if (own := [rollout for rollout in group if rollout.verdict.scored])]
        found = record.reflections = self.reflector.reflect(scored, f"step {step}", self.memory.known_insights)
        reflected = time.perf_counter()
        for group in scored:
            task = self.reflector.tasks[group[0].task_id]
            new = GroupRecord(step, task, group, (), (), self.memory.generation)
            record.groups[group[0].group_id] = new
        record.num_steps += num_steps
        update = evolve_memory(
            record,
            self.memory,
            lambda clusters: self.reflector.abstract(clusters, f"step {step}", record.num_steps),
            policy_version,
        )
        record.clear(update)
        seconds = {"time/reflect_s": reflected - started, "time/memory_s": time.perf_counter() - reflected}
        return found.figures() | update.figures(found) | self.reflector.figures_of(update.written) | seconds
