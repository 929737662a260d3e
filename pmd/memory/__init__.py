"""The procedural memory of one run, and the few functions that training calls.

Between updates the memory is only read (`recall`). At the end of an epoch, or with each batch
(`memory.update`), `evolve_memory` writes audits, experiences, insights and behaviours in one update, all or nothing,
and then refreshes the index. Nothing here imports Lightning or torch, so a memory can be opened on any machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

from pmd.config.schema import MemoryConfig
from pmd.errors import AlignmentError, MemoryStoreError
from pmd.memory.behaviour_writer import Written
from pmd.memory.embed import make_embedder
from pmd.memory.held_out import HeldOut
from pmd.memory.index import TaskIndex
from pmd.memory.judge import ItemAudit
from pmd.memory.reflect import Reflections
from pmd.memory.retrieve import Retriever
from pmd.memory.store import MemoryStore
from pmd.memory.tools.transfer import import_file
from pmd.memory.update import Writer, open_writer
from pmd.types import InsightChange, ItemKind, MemoryItem, Rollout, Task

#: Writes one behaviour line for the insight texts of each cluster; None if the model's output is malformed.
Abstraction = Callable[[Sequence[Sequence[str]]], Written]


@dataclass(frozen=True, slots=True)
class Question:
    """What the memory is asked about one task."""

    task: Task
    seed: int  # from which the order of the items is drawn
    group_id: str | None = None  # asks for a past success, too, of another group than this one


@dataclass(frozen=True, slots=True)
class Recalled:
    """What the memory holds for one task."""

    items: tuple[MemoryItem, ...] = ()  # at most k
    past_success: str | None = None  # a verified success on the task
    generation: int = 0  # of the memory: how many times it had been updated


class ReadableMemory(Protocol):
    """What rollouts and evaluation need of a memory: nothing that changes it."""

    def recall(self, questions: Sequence[Question]) -> list[Recalled]:
        """Return the answer to each question, all from one generation."""
        ...


@dataclass(slots=True)
class GroupRecord:
    """One group of rollouts, and the memory items retrieved for its teacher."""

    step: int
    task: Task
    rollouts: list[Rollout]  # none if an earlier update has written them
    items: tuple[MemoryItem, ...]
    dropped: tuple[MemoryItem, ...]  # retrieved, but did not fit into the prompt
    memory_generation: int  # from which the items were retrieved


@dataclass(frozen=True, slots=True)
class MemoryUpdate:
    """Counts from one update, besides the items it wrote."""

    written: Written | None = None  # the behaviours; None if none were due
    num_refused: int = 0  # changes with an unknown target, or that would retire a useful item
    num_merged: int = 0
    changed_by_audits: dict[str, int] = field(default_factory=dict)  # new status -> items

    def figures(self, reflections: Reflections) -> dict[str, float]:
        """Return the metrics of this update, which wrote what these reflections propose."""
        return {
            "memory/malformed_behaviours": 0.0 if self.written is None else float(self.written.texts.count(None)),
            "memory/parse_failure_rate": reflections.num_malformed / max(1, reflections.num_prompts),
            "memory/refused_changes": float(self.num_refused),
            "memory/merged": float(self.num_merged),
        }


@dataclass(slots=True)
class EpochRecord:
    """What has happened since the memory was last updated, and counts of the epoch so far.

    Each callback adds its part, and the memory is then updated from the whole record. A checkpoint within an epoch
    keeps it (pending.py).
    """

    epoch: int = 0
    is_complete: bool = False  # whether the epoch's last batch is over; false where the run ends within the epoch
    groups: dict[str, GroupRecord] = field(default_factory=dict)  # by group id; those that no update has written yet
    num_groups: int = 0  # of the epoch
    num_hits: int = 0  # of these, groups whose teacher was shown at least one memory item
    num_memory_tokens: int = 0  # of the epoch, in the teachers' prompts
    num_steps: int = 0  # optimizer steps since behaviours were last written, with those of the rollouts just recorded
    reflected: Reflections = field(default_factory=Reflections)  # of the epoch's updates: counts, without changes
    written: Written = field(default_factory=Written)  # of the epoch's updates
    reflections: Reflections = field(default_factory=Reflections)  # for the next update
    audits: tuple[ItemAudit, ...] = ()

    def start(self, epoch: int) -> None:
        """Begin to count a new epoch."""
        self.epoch, self.is_complete = epoch, False
        self.num_groups, self.num_hits, self.num_memory_tokens = 0, 0, 0
        self.reflected, self.written = Reflections(), Written()

    def clear(self, update: MemoryUpdate) -> None:
        """Count what an update has written, and forget it."""
        self.reflected = self.reflected.plus(self.reflections)
        if update.written is not None:
            self.written, self.num_steps = _joined(self.written, update.written), 0
        self.groups, self.reflections, self.audits = {}, Reflections(), ()

    @property
    def hit_rate(self) -> float:
        """Share of the epoch's groups whose teacher was shown at least one memory item."""
        return self.num_hits / max(1, self.num_groups)


class ProceduralMemory:
    """A memory store with its index and retriever, all kept at the same generation."""

    def __init__(
        self,
        path: Path,
        config: MemoryConfig,
        train_keys: Sequence[str],
        excluded: frozenset[str],
        held_out: HeldOut | None = None,
    ):
        """Open or create the store at `path`.

        Args:
            train_keys: memory keys of all training tasks; the hashing embedder's word weights are fitted to them.
            excluded: ids of training tasks that must not be remembered (they are also in a held-out split).
            held_out: the held-out tasks, none of which a store or an import may hold; None compares with none.

        Raises:
            MemoryStoreError: the store or the import cannot be used, or holds a held-out task.
        """
        self.path = path
        self.config = config
        self.excluded = excluded
        self._held_out = held_out
        self._embedder = make_embedder(config.embedder, train_keys, device=config.embedder_device)
        self._open()
        if config.import_path is not None and self.generation == 0:
            import_file(self.store, Path(config.import_path), excluded, held_out)
            self.retriever.refresh()

    @property
    def generation(self) -> int:
        """How many times the memory has been updated."""
        return self.store.generation

    @property
    def is_closed(self) -> bool:
        """Whether nothing more is written: a frozen memory is written once, or imported."""
        return self.config.frozen and self.generation > 0

    def retrieve(self, task: Task, *, seed: int) -> list[MemoryItem]:
        """Return at most k items for `task`, in an order drawn from `seed`."""
        return self.retriever.retrieve(task.lookup_key, seed=seed, task_id=task.task_id)

    def past_success(self, task: Task, group_id: str = "") -> str | None:
        """Return a verified success on this task, if there is one, that is not of the group being trained on."""
        return self.retriever.past_success(task.task_id, group_id)

    def recall(self, questions: Sequence[Question]) -> list[Recalled]:
        """Return the answer to each question."""
        return [self._answer(question) for question in questions]

    def known_insights(self, task_id: str) -> list[MemoryItem]:
        """Return the insights of a task that a reflection on the task may keep, edit or retire."""
        return [
            MemoryItem(item.id, 1, cast(ItemKind, item.kind), item.text, item.task_row, task_id, 1.0)
            for item in self.retriever.insights(task_id)
        ]

    def snapshot(self) -> bytes:
        """Return the whole store as bytes, for a checkpoint."""
        return self.store.snapshot()

    def restore(self, data: bytes) -> None:
        """Replace the store with a snapshot, then reopen index and retriever."""
        self.store.close()
        MemoryStore.restore(self.path, data)
        self._open()

    def close(self) -> None:
        """Close the store's file."""
        self.store.close()

    def _answer(self, question: Question) -> Recalled:
        task, group_id = question.task, question.group_id
        past_success = None if group_id is None else self.past_success(task, group_id)
        return Recalled(tuple(self.retrieve(task, seed=question.seed)), past_success, self.generation)

    def _open(self) -> None:
        self.store = MemoryStore.open(self.path, embedder=self._embedder, config=self.config)
        self._refuse_held_out()
        self.index = TaskIndex.open(self.store)
        self.retriever = Retriever(self.store, self.index, self.config)

    def _refuse_held_out(self) -> None:
        if self._held_out is None:
            return
        found = {
            t.task_id: self._held_out.describe_task(t.task_id, t.question, t.memory_key) for t in self.store.tasks()
        }
        held_out = [task_id for task_id, reason in found.items() if reason]
        if held_out:
            self.store.close()
            raise MemoryStoreError(
                f"memory store={self.path} holds {len(held_out)} task(s) that this run holds out, the first is task_id="
                f"{held_out[0]}: {found[held_out[0]]}. Start the run in another directory, without this memory."
            )


def evolve_memory(
    record: EpochRecord, memory: ProceduralMemory, abstraction: Abstraction, policy_version: int
) -> MemoryUpdate:
    """Write what has happened since the last update to the memory, all or nothing, then refresh index and retriever.

    What teachers were shown is logged, and the rollouts that no update has written yet are written. A closed memory
    (see `is_closed`) is left unchanged.

    Raises:
        AlignmentError: a group's items were retrieved from a generation other than the current one.
        MemoryStoreError: a task is not in the training split, or the store cannot be written.
    """
    if memory.is_closed:
        return MemoryUpdate()
    _check_generation(record, memory)
    changed_by_audits: dict[str, int] = {}
    written = None
    with open_writer(memory.store) as writer:
        if memory.config.transient:
            writer.forget()
        for group_id, group in record.groups.items():
            writer.log_retrievals(group.step, group_id, group.items, group.dropped)
        if record.audits:
            changed_by_audits = writer.audit(record.audits)
        task_rows, experience_ids = _write_experiences(writer, memory.excluded, record)
        num_refused = _write_insights(writer, record.reflections.changes, task_rows, experience_ids, policy_version)
        num_merged = writer.merge(task_rows.values())
        writer.bound()
        if memory.config.frozen or writer.ledger.generation % memory.config.behaviour_every == 0:
            written = _write_behaviours(writer, abstraction, policy_version)
    memory.retriever.refresh()
    return MemoryUpdate(written, num_refused, num_merged, changed_by_audits)


def _joined(one: Written, other: Written) -> Written:
    """Return what was written in both, and what it cost together."""
    return Written(
        [*one.texts, *other.texts],
        one.num_tokens + other.num_tokens,
        one.num_calls + other.num_calls,
        one.num_failed + other.num_failed,
        one.num_malformed + other.num_malformed,
        one.num_deferred + other.num_deferred,
        one.problem or other.problem,
    )


def _check_generation(record: EpochRecord, memory: ProceduralMemory) -> None:
    """Refuse groups whose items came from another generation: their ids and audits would belong to other items."""
    for group_id, group in record.groups.items():
        if group.memory_generation != memory.generation:
            raise AlignmentError(
                f"group {group_id} was shown memory generation={group.memory_generation}, the memory is at "
                f"{memory.generation}: memory is read-only between updates, and what was shown is logged with the next."
            )


def _write_experiences(
    writer: Writer, excluded: frozenset[str], record: EpochRecord
) -> tuple[dict[str, int], dict[str, int | None]]:
    """Write the verified attempts; return task rows by task id and experience ids by rollout id (None if not kept)."""
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
    """Apply the changes that reflections propose; return how many were refused."""
    num_refused = 0
    for change in changes:
        if change.task_id in task_rows:
            known = (experience_ids.get(rollout_id) for rollout_id in change.rollout_ids)
            parents = [experience for experience in known if experience is not None]
            num_refused += not writer.apply_change(task_rows[change.task_id], change, policy_version, parents)
    return num_refused


def _write_behaviours(writer: Writer, abstraction: Abstraction, policy_version: int) -> Written:
    """Cluster the insights, have new or changed clusters described; return the descriptions."""
    clusters = writer.clusters()
    new = [n for n, cluster in enumerate(clusters) if cluster.needs_text]
    written = abstraction([clusters[n].texts for n in new])
    texts = dict(zip(new, written.texts, strict=True))
    changes = [cluster.change(texts.get(n)) for n, cluster in enumerate(clusters)]
    writer.replace_behaviours(changes, policy_version=policy_version)
    return written
