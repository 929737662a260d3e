"""The memory of one run: store, problem index and retriever behind the few calls that training makes.

Enter: training tasks, their verified rollouts, drafts of insights, an abstraction function. Leave: procedures for the
teacher. Read-only within an epoch; `learn` is the only way in.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pmd.config import MemoryConfig
from pmd.memory.audits import ItemAudit
from pmd.memory.behaviours import find_clusters
from pmd.memory.embed import make_embedder
from pmd.memory.index import ProblemIndex
from pmd.memory.retrieve import Retriever
from pmd.memory.store import MemoryStore
from pmd.memory.transfer import import_file
from pmd.memory.write import Writer
from pmd.types import InsightDraft, Procedure, ProcedureKind, Rollout, Task

#: Texts of the insights of each cluster in; one behaviour line each out, None where the model's output is malformed.
Abstraction = Callable[[Sequence[Sequence[str]]], Sequence[str | None]]


@dataclass(frozen=True, slots=True)
class Learnt:
    """What one epoch's update did beside writing."""

    num_wordless: int  # clusters that the policy could not put into words
    num_refused: int  # drafts with an unknown target, or that would retire what audits found useful
    num_merged: int
    changed_by_audits: dict[str, int]  # new status -> items


class ProceduralMemory:
    """A store with its index and retriever, kept at the same generation."""

    def __init__(self, path: Path, config: MemoryConfig, train_keys: Sequence[str], excluded: frozenset[str]):
        """Open or create the store at `path`.

        Args:
            train_keys: memory keys of all training problems; they fit the hashing embedder's word weights.
            excluded: ids of training tasks that must not be remembered (they stand in a held-out split too).
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
        """Whether nothing is written at the end of `epoch`: a frozen memory is built once, an imported one is built."""
        return self.config.frozen and (epoch > 0 or self.config.import_path is not None)

    def retrieve(self, task: Task, *, seed: int) -> list[Procedure]:
        """Return at most k procedures for `task`, in an order drawn from `seed`."""
        return self.retriever.retrieve(task.memory_key or task.question, seed=seed, task_id=task.task_id)

    def past_success(self, task: Task) -> str | None:
        """Return a verified success of this very task from an earlier epoch."""
        return self.retriever.past_success(task.task_id)

    def learn(
        self,
        tasks: Mapping[str, Task],
        rollouts: Sequence[Rollout],
        drafts: Sequence[InsightDraft],
        abstraction: Abstraction,
        policy_version: int,
        audits: Sequence[ItemAudit] = (),
    ) -> Learnt:
        """Write one epoch, all of it or nothing: audits, experiences, insights, and the behaviours behind them.

        Raises:
            MemoryStoreError: a task is not of the training split, or the store cannot be written.
        """
        with self.store.update() as writer:
            changed_by_audits = writer.audit(audits)
            problem_ids, num_refused = self._write_attempts(writer, tasks, rollouts, drafts, policy_version)
            num_merged = writer.merge(problem_ids.values())
            writer.bound()
            clusters = find_clusters(self.store, self.config)
            changed = [cluster for cluster in clusters if cluster.changed]
            texts = dict(
                zip(
                    (id(cluster) for cluster in changed),
                    abstraction([cluster.texts for cluster in changed]),
                    strict=True,
                )
            )
            writer.replace_behaviours(
                [cluster.draft(texts.get(id(cluster))) for cluster in clusters], policy_version=policy_version
            )
        self.retriever.refresh()
        return Learnt(sum(text is None for text in texts.values()), num_refused, num_merged, changed_by_audits)

    def _write_attempts(
        self,
        writer: Writer,
        tasks: Mapping[str, Task],
        rollouts: Sequence[Rollout],
        drafts: Sequence[InsightDraft],
        policy_version: int,
    ) -> tuple[dict[str, int], int]:
        """Write attempts and what was learnt from them; returns the problems' ids and how many drafts were refused."""
        problem_ids: dict[str, int] = {}
        experience_ids: dict[str, int | None] = {}
        num_refused = 0
        for rollout in rollouts:
            if rollout.task_id in self.excluded or not rollout.verdict.scored:
                continue
            if rollout.task_id not in problem_ids:
                problem_ids[rollout.task_id] = writer.add_problem(tasks[rollout.task_id])
            experience_ids[rollout.rollout_id] = writer.add_experience(
                problem_ids[rollout.task_id], rollout, rollout.completion.policy_version
            )
        for draft in drafts:
            if draft.task_id in problem_ids:
                known = (experience_ids.get(rollout_id) for rollout_id in draft.rollout_ids)
                parents = [experience for experience in known if experience is not None]
                num_refused += not writer.apply_draft(problem_ids[draft.task_id], draft, policy_version, parents)
        return problem_ids, num_refused

    def shadows(self, task_id: str) -> list[Procedure]:
        """Return the insights of one problem that are still on probation."""
        return [
            Procedure(item.id, 1, cast(ProcedureKind, item.kind), item.text, item.problem_id, task_id, 1.0)
            for item in self.retriever.shadows(task_id)
        ]

    def known_insights(self, task_id: str) -> list[Procedure]:
        """Return all insights of one problem that a reflection on it may keep, edit or retire."""
        return [
            Procedure(item.id, 1, cast(ProcedureKind, item.kind), item.text, item.problem_id, task_id, 1.0)
            for item in self.retriever.insights(task_id)
        ]

    def log_retrievals(
        self, step: int, group_id: str, procedures: Sequence[Procedure], dropped: Sequence[Procedure] = ()
    ) -> None:
        """Remember what a group's teacher was shown and what it had no room for; written with the next epoch."""
        self.store.log_retrievals(step, group_id, procedures, dropped)

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
        self.index = ProblemIndex.open(self.store)
        self.retriever = Retriever(self.store, self.index, self._embedder, self.config)
