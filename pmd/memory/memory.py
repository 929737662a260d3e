"""The memory of one run: store, problem index and retriever behind the few calls that training makes.

Enter: training tasks, their verified rollouts, drafts of insights, an abstraction function. Leave: procedures for the
teacher. Read-only within an epoch; `learn` is the only way in.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pmd.config import MemoryConfig
from pmd.memory.behaviours import find_clusters
from pmd.memory.embed import make_embedder
from pmd.memory.index import ProblemIndex
from pmd.memory.retrieve import Retriever
from pmd.memory.store import MemoryStore
from pmd.types import InsightDraft, Procedure, Rollout, Task

#: Texts of the insights of each cluster in; one behaviour line each out, None where the model's output is malformed.
Abstraction = Callable[[Sequence[Sequence[str]]], Sequence[str | None]]


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

    @property
    def generation(self) -> int:
        """How many times the memory has been written."""
        return self.store.generation

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
    ) -> int:
        """Write one epoch: experiences and insights, then the behaviours behind them; two generations.

        Returns:
            how many clusters the policy could not put into words.

        Raises:
            MemoryStoreError: a task is not of the training split, or the store cannot be written.
        """
        with self.store.update() as writer:
            problem_ids, experience_ids = {}, {}
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
                    writer.add_insight(
                        problem_ids[draft.task_id],
                        draft.kind,
                        draft.text,
                        policy_version=policy_version,
                        parents=parents,
                    )
        clusters = find_clusters(self.store, self.config)
        changed = [cluster for cluster in clusters if cluster.changed]
        asked = [[item.text for item in (*cluster.insights, *cluster.lessons)] for cluster in changed]
        texts = dict(zip((id(cluster) for cluster in changed), abstraction(asked), strict=True))
        with self.store.update() as writer:
            drafts_of_behaviours = [cluster.draft(texts.get(id(cluster))) for cluster in clusters]
            writer.replace_behaviours(drafts_of_behaviours, policy_version=policy_version)
        self.retriever.refresh()
        return sum(text is None for text in texts.values())

    def log_retrievals(self, step: int, group_id: str, procedures: Sequence[Procedure]) -> None:
        """Remember what a group's teacher was shown; written with the next epoch."""
        self.store.log_retrievals(step, group_id, list(procedures))

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
