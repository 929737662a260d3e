"""The procedural memory of one run, behind the few calls that training makes.

During an epoch it is read: `retrieve`, `past_success`. At the epoch's end `evolve_memory` turns the epoch's record into
one update of the store: audits, experiences, insights and the behaviours behind them, all of it or nothing; the index
follows. No Lightning and no torch here, so a memory opens on any machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from pmd.config.schema import MemoryConfig
from pmd.errors import AlignmentError
from pmd.memory.embed import make_embedder
from pmd.memory.index import TaskIndex
from pmd.memory.judge import ItemAudit
from pmd.memory.reflect import Reflections
from pmd.memory.retrieve import Retriever
from pmd.memory.store import MemoryStore
from pmd.memory.tools.transfer import import_file
from pmd.memory.update import Writer, open_writer
from pmd.types import InsightChange, ItemKind, MemoryItem, Rollout, Task

#: From the insight texts of each cluster to one behaviour line per cluster, None where the model's output is malformed.
Abstraction = Callable[[Sequence[Sequence[str]]], Sequence[str | None]]


@dataclass(slots=True)
class GroupRecord:
    """One group of rollouts, and what its teacher was shown of memory."""

    step: int
    task: Task
    rollouts: list[Rollout]
    items: tuple[MemoryItem, ...]
    dropped: tuple[MemoryItem, ...]  # retrieved, but the prompt had no room for them
    memory_generation: int  # that the items were retrieved from


@dataclass(slots=True)
class EpochRecord:
    """What happened in one epoch, shared by the callbacks: each adds its part, the memory is updated from all of it."""

    epoch: int = 0
    groups: dict[str, GroupRecord] = field(default_factory=dict)  # by group id
    num_memory_tokens: int = 0  # in the teachers' prompts
    reflections: Reflections = field(default_factory=Reflections)
    audits: tuple[ItemAudit, ...] = ()

    def start(self, epoch: int) -> None:
        """Begin an empty epoch."""
        self.epoch, self.groups, self.num_memory_tokens = epoch, {}, 0
        self.reflections, self.audits = Reflections(), ()

    @property
    def hit_rate(self) -> float:
        """Share of the groups whose teacher was shown memory."""
        return sum(bool(group.items) for group in self.groups.values()) / max(1, len(self.groups))


@dataclass(frozen=True, slots=True)
class MemoryUpdate:
    """What one update did, beyond the items it wrote."""

    num_malformed_behaviours: int = 0  # clusters that the policy could not put into words
    num_refused: int = 0  # changes with an unknown target, or that would retire what audits found useful
    num_merged: int = 0
    changed_by_audits: dict[str, int] = field(default_factory=dict)  # new status -> items


class ProceduralMemory:
    """A store with its index and retriever, kept at the same generation."""

    def __init__(self, path: Path, config: MemoryConfig, train_keys: Sequence[str], excluded: frozenset[str]):
        """Open or create the store at `path`.

        Args:
            train_keys: memory keys of all training tasks; the hashing embedder's word weights are fitted to them.
            excluded: ids of training tasks that must not be remembered (they are in a held-out split too).
        """
        self.path = path
        self.config = config
        self.excluded = excluded
        self._embedder = make_embedder(config.embedder, train_keys)
        self._open()
        if config.import_path is not None and self.generation == 0:
            import_file(self.store, Path(config.import_path), excluded)
            self.retriever.refresh()

    @property
    def generation(self) -> int:
        """How many times the memory has been written."""
        return self.store.generation

    def is_closed(self, epoch: int) -> bool:
        """Whether nothing is written at the end of `epoch`: a frozen memory is written once, an imported one never."""
        return self.config.frozen and (epoch > 0 or self.config.import_path is not None)

    def retrieve(self, task: Task, *, seed: int) -> list[MemoryItem]:
        """Return at most k items for `task`, in an order drawn from `seed`."""
        return self.retriever.retrieve(task.memory_key or task.question, seed=seed, task_id=task.task_id)

    def past_success(self, task: Task) -> str | None:
        """Return a verified success of this very task from an earlier epoch."""
        return self.retriever.past_success(task.task_id)

    def known_insights(self, task_id: str) -> list[MemoryItem]:
        """Return all insights of one task that a reflection on it may keep, edit or retire."""
        return [
            MemoryItem(item.id, 1, cast(ItemKind, item.kind), item.text, item.task_row, task_id, 1.0)
            for item in self.retriever.insights(task_id)
        ]

    def snapshot(self) -> bytes:
        """Return the whole store as bytes, for a checkpoint."""
        return self.store.snapshot()

    def restore(self, data: bytes) -> None:
        """Put a snapshot in place of the present store; index and retriever follow."""
        self.store.close()
        MemoryStore.restore(self.path, data)
        self._open()

    def close(self) -> None:
        """Close the store's file."""
        self.store.close()

    def _open(self) -> None:
        self.store = MemoryStore.open(self.path, embedder=self._embedder, config=self.config)
        self.index = TaskIndex.open(self.store)
        self.retriever = Retriever(self.store, self.index, self.config)


def evolve_memory(
    record: EpochRecord, memory: ProceduralMemory, abstraction: Abstraction, policy_version: int
) -> MemoryUpdate:
    """Write what one epoch teaches, all of it or nothing, and bring index and retrieval up to it.

    A closed memory (frozen, and written or imported) stays as it is.

    Raises:
        AlignmentError: a group's teacher was shown another generation of the memory than the present one.
        MemoryStoreError: a task is not of the training split, or the store cannot be written.
    """
    if memory.is_closed(record.epoch):
        return MemoryUpdate()
    _check_generation(record, memory)
    changed_by_audits: dict[str, int] = {}
    with open_writer(memory.store) as writer:
        for group_id, group in record.groups.items():
            writer.log_retrievals(group.step, group_id, group.items, group.dropped)
        if record.audits:
            changed_by_audits = writer.audit(record.audits)
        task_rows, experience_ids = _write_experiences(writer, memory.excluded, record)
        num_refused = _write_insights(writer, record.reflections.changes, task_rows, experience_ids, policy_version)
        num_merged = writer.merge(task_rows.values())
        writer.bound()
        num_malformed = _write_behaviours(writer, abstraction, policy_version)
    memory.retriever.refresh()
    return MemoryUpdate(num_malformed, num_refused, num_merged, changed_by_audits)


def _check_generation(record: EpochRecord, memory: ProceduralMemory) -> None:
    """Refuse groups whose items were read from another generation: ids and audits would be of other items."""
    for group_id, group in record.groups.items():
        if group.memory_generation != memory.generation:
            raise AlignmentError(
                f"group {group_id} was shown memory generation={group.memory_generation}, the memory is at "
                f"{memory.generation}: memory is read-only within an epoch; write it at the epoch's end only."
            )


def _write_experiences(
    writer: Writer, excluded: frozenset[str], record: EpochRecord
) -> tuple[dict[str, int], dict[str, int | None]]:
    """Write the verified attempts; return the tasks' rows and each rollout's experience, None where none was kept."""
    task_rows: dict[str, int] = {}
    experience_ids: dict[str, int | None] = {}
    for group in record.groups.values():
        task_id = group.task.task_id
        scored = [rollout for rollout in group.rollouts if rollout.verdict.scored]
        if not scored or task_id in excluded:
            continue
        task_rows[task_id] = writer.add_task(group.task)
        for rollout in scored:
            experience_ids[rollout.rollout_id] = writer.add_experience(
                task_rows[task_id], rollout, rollout.completion.policy_version
            )
    return task_rows, experience_ids


def _write_insights(
    writer: Writer,
    changes: Sequence[InsightChange],
    task_rows: dict[str, int],
    experience_ids: dict[str, int | None],
    policy_version: int,
) -> int:
    """Carry out the changes that reflections ask for; return how many were refused."""
    num_refused = 0
    for change in changes:
        if change.task_id in task_rows:
            known = (experience_ids.get(rollout_id) for rollout_id in change.rollout_ids)
            parents = [experience for experience in known if experience is not None]
            num_refused += not writer.apply_change(task_rows[change.task_id], change, policy_version, parents)
    return num_refused


def _write_behaviours(writer: Writer, abstraction: Abstraction, policy_version: int) -> int:
    """Cluster the insights and have new or changed clusters put into words; return how many could not be."""
    clusters = writer.clusters()
    new = [n for n, cluster in enumerate(clusters) if cluster.needs_text]
    texts = dict(zip(new, abstraction([clusters[n].texts for n in new]), strict=True))
    changes = [cluster.change(texts.get(n)) for n, cluster in enumerate(clusters)]
    writer.replace_behaviours(changes, policy_version=policy_version)
    return sum(text is None for text in texts.values())
