"""The stream of training batches: task -> group of rollouts -> verdicts -> teacher context -> batch.

Rollouts are generated inside the loader's `__next__` and nowhere else, so each batch is as fresh as the weights.
Memory changes at epoch ends, in the callbacks; with `memory.update: batch`, it is updated here from each batch's
rollouts, before their teacher contexts are made. The position in the data is counted in tasks, so a
run that stopped within an epoch goes on with the tasks that are left, in batches of any size.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from random import Random
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from pmd.batch import Batch, Example
from pmd.config.schema import RunConfig
from pmd.engines.base import Engine, Sampling
from pmd.errors import ConfigError
from pmd.losses.policy_gradient import group_advantages
from pmd.memory import Question, ReadableMemory, Recalled
from pmd.memory.shared import SharedUpdater
from pmd.memory.stream import MemoryUpdater
from pmd.ranks import Ranks
from pmd.rollouts.generate import RolloutGroups, gather_rollouts, generate_rollouts, is_uniform
from pmd.seeds import derive_seed
from pmd.tasks import tasks_of_epoch
from pmd.tasks.prompts.base import PromptFormat
from pmd.teacher import ContextBuilder
from pmd.types import Rollout, Split, Task

#: Metrics of a whole rollout batch; logged with its first optimizer step, and 0 with the others.
COSTS = (
    "rollout/num_tokens", "reflect/num_tokens", "reflect/num_behaviour_tokens", "memory/behaviour_writer_tokens",
    "time/rollout_s", "time/verify_s", "time/overlap_s", "time/context_s", "time/reflect_s", "time/memory_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Position:
    """What a run has done of its data."""

    epoch: int = 0
    step: int = 0  # optimizer steps of the whole run
    num_begun: int = 0  # tasks of the epoch, in its order, that belong to a batch that has begun
    owed: tuple[str, ...] = ()  # of these, the tasks whose optimizer steps are still to come
    owed_steps: int = 0
    num_rollouts: int = 0  # of the whole run


@dataclass(frozen=True, slots=True)
class TaskBatch:
    """The tasks of one rollout batch."""

    tasks: Sequence[Task]
    epoch: int
    step: int  # of the run: its first optimizer step
    key: str  # identifies the batch; seeds and rollout ids are derived from it
    num_updates: int  # optimizer steps; the tasks are divided among them
    num_begun: int  # tasks of the epoch that have begun with this batch
    num_in_epoch: int


class RolloutDataModule(LightningDataModule):
    """Streams fresh, verified rollouts with their teacher contexts; one epoch visits every training task once, or as
    many as `data.weights` says."""

    def __init__(
        self,
        config: RunConfig,
        tasks: Mapping[Split, Sequence[Task]],
        engine: Engine,
        prompts: PromptFormat,
        memory: ReadableMemory | None,
        updater: MemoryUpdater | SharedUpdater | None = None,
        ranks: Ranks | None = None,
    ):
        """Take the parts of a run; `updater` updates the memory with each batch."""
        super().__init__()
        self.config = config
        self.tasks = tasks
        self.engine = engine
        self.prompts = prompts
        self.memory = memory
        self.updater = updater
        self.between_batches: Callable[[], None] | None = None  # called when a step is over and the next batch is due
        self.ranks = ranks  # of a run on several devices: each generates a share of every batch, and trains on all
        self.contexts = ContextBuilder(prompts, config.teacher, config.memory.max_tokens)
        self.position = Position()
        self.tasks_digest = digest_of(tasks)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training tasks."""
        num_batches = -(-len(self._tasks_of(0)) // self.config.rollouts.tasks_per_step)
        return num_batches * self.config.rollouts.updates_per_batch

    def train_dataloader(self) -> DataLoader:
        """Return the stream of the rest of an epoch; nothing is generated before it is iterated over."""
        return DataLoader(RolloutStream(self), batch_size=None, num_workers=0)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch, and a digest of the tasks that it counts."""
        return asdict(self.position) | {"tasks": self.tasks_digest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state was saved."""
        self.position = Position(**{field.name: state_dict[field.name] for field in fields(Position)})

    def num_steps(self, max_epochs: int, max_steps: int) -> int:
        """Return the optimizer steps of the whole run, from its start to its end; -1 means no limit.

        Steps that were taken before the run was resumed count as they were taken.
        """
        if max_epochs == -1:
            return max_steps
        steps = self.position.step
        if self.position.epoch < max_epochs:
            rest = sum(batch.num_updates for batch in self.task_batches(self.position))
            steps += rest + (max_epochs - self.position.epoch - 1) * self.steps_per_epoch
        return steps if max_steps == -1 else min(steps, max_steps)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Yield the batches of a whole epoch, one for each optimizer step."""
        return self.rest_of_epoch(Position(epoch, epoch * self.steps_per_epoch))

    def rest_of_epoch(self, start: Position) -> Iterator[Batch]:
        """Yield the batches that are left of an epoch, and keep count of the position."""
        self.position = start
        task_batches = self.task_batches(start)
        own = task_batches if self.ranks is None else [self._own_share(self.ranks, batch) for batch in task_batches]
        for task_batch, generated in zip(task_batches, self._generate_all(own), strict=True):
            if self.ranks is not None:  # here, because other threads must not talk to other ranks
                generated = gather_rollouts(self.ranks, generated)
            yield from self._training_batches(task_batch, generated)

    def task_batches(self, start: Position) -> list[TaskBatch]:
        """Shuffle the training tasks and divide those that are left into rollout batches.

        If the run stopped between the optimizer steps of a batch, its remaining tasks come first, in as many steps as
        were left.
        """
        rollouts, seed, epoch = self.config.rollouts, self.config.seed_everything, start.epoch
        tasks = self._tasks_of(epoch)
        Random(derive_seed(seed, "order", epoch)).shuffle(tasks)
        batches, step = [], start.step
        if start.owed:
            by_id = {task.task_id: task for task in tasks}
            owed = [by_id[task_id] for task_id in start.owed]
            key = f"{seed}/train/{epoch}/{step}"
            batches.append(TaskBatch(owed, epoch, step, key, start.owed_steps, start.num_begun, len(tasks)))
            step += start.owed_steps
        for first in range(start.num_begun, len(tasks), rollouts.tasks_per_step):
            chosen, updates = tasks[first : first + rollouts.tasks_per_step], rollouts.updates_per_batch
            key = f"{seed}/train/{epoch}/{step}"
            batches.append(TaskBatch(chosen, epoch, step, key, updates, first + len(chosen), len(tasks)))
            step += updates
        return batches

    @staticmethod
    def _own_share(ranks: Ranks, batch: TaskBatch) -> TaskBatch:
        """Return the tasks of a batch that this rank attempts."""
        return replace(batch, tasks=ranks.share(batch.tasks))

    def first_pass(self, engine: Engine) -> tuple[list[list[Rollout]], dict[str, float]]:
        """Have `engine` attempt every training task once more, before the first step; return groups and costs.

        The rollouts count as the run's, although nothing is trained on them.
        """
        groups: list[list[Rollout]] = []
        costs = {"rollout/num_tokens": 0.0, "time/rollout_s": 0.0, "time/verify_s": 0.0}
        for batch in self.task_batches(Position()):
            key = f"{self.config.seed_everything}/first pass/{batch.step}"
            generated = self._generate(replace(batch, key=key), engine)
            groups += generated.groups
            costs["rollout/num_tokens"] += sum(len(r.completion.token_ids) for r in generated.rollouts)
            costs["time/rollout_s"] += generated.generate_s
            costs["time/verify_s"] += generated.verify_s
        num_rollouts = self.position.num_rollouts + sum(map(len, groups))
        self.position = replace(self.position, num_rollouts=num_rollouts)
        return groups, costs

    def _tasks_of(self, epoch: int) -> list[Task]:
        """Return the training tasks of an epoch: all of them, or a mixture by `data.weights`."""
        tasks, weights = self.tasks["train"], self.config.data.weights
        return tasks_of_epoch(tasks, weights, self.config.seed_everything, epoch) if weights else list(tasks)

    def _generate_all(self, task_batches: Sequence[TaskBatch]) -> Iterator[RolloutGroups]:
        """Yield the rollouts of each batch; with `rollouts.prefetch` the next ones are generated meanwhile."""
        if not self.config.rollouts.prefetch:
            yield from map(self._generate_with_signal, task_batches)
            return
        pool, pending = ThreadPoolExecutor(1), None
        try:
            for upcoming in [*task_batches, None]:
                generated = None if pending is None else _result_of(pending)
                pending = None if upcoming is None else pool.submit(self._generate_with_signal, upcoming)
                if generated is not None:
                    yield generated
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _generate(self, batch: TaskBatch, engine: Engine | None = None) -> RolloutGroups:
        """Have the student attempt every task of the batch, without any memory in its prompt."""
        config = self.config.rollouts
        prompts = [(task, self.prompts.student(task)) for task in batch.tasks]
        sampling = Sampling(config.temperature, config.max_new_tokens)
        engine = self.engine if engine is None else engine
        return generate_rollouts(engine, prompts, config.group_size, sampling, batch.key, self.config.verifiers)

    def _generate_with_signal(self, batch: TaskBatch) -> RolloutGroups:
        """Generate a batch; with `uniform_groups: resample`, attempt tasks again whose rewards are all equal."""
        config, generated = self.config.rollouts, self._generate(batch)
        tries = config.max_resamples if config.uniform_groups == "resample" else 0
        for attempt in range(1, tries + 1):
            again = [n for n, group in enumerate(generated.groups) if is_uniform(group)]
            if not again:
                break
            tasks, key = [batch.tasks[n] for n in again], f"{batch.key}/again{attempt}"
            generated = generated.replaced(again, self._generate(replace(batch, tasks=tasks, key=key)))
        return generated

    def _training_batches(self, task_batch: TaskBatch, generated: RolloutGroups) -> Iterator[Batch]:
        """Divide one rollout batch, by group, into a training batch for each of its optimizer steps."""
        learned: dict[str, float] = {}
        if self.updater is not None:
            learned = self.updater.update(
                generated.groups, task_batch.step, task_batch.num_updates, self.engine.policy_version
            )
        started = time.perf_counter()
        draws = [Random(derive_seed(task_batch.key, task.task_id, "context")) for task in task_batch.tasks]
        recalled = self._recall(task_batch.tasks, generated.groups, draws)
        examples = list(map(self._examples, task_batch.tasks, generated.groups, recalled, draws))
        metrics = _rollout_metrics(generated.first_groups) | self._signal_metrics(generated)
        metrics |= {
            "rollout/hung": float(generated.num_hung),
            "rollout/versions_behind": float(self.engine.policy_version - generated.policy_version),
            "time/rollout_s": generated.generate_s,
            "time/verify_s": generated.verify_s,
            "time/context_s": time.perf_counter() - started,
        }
        if self.config.rollouts.prefetch:
            metrics["time/overlap_s"] = generated.overlap_s
        metrics |= learned
        num_updates = task_batch.num_updates
        for update in range(num_updates):
            groups = examples[update::num_updates]
            chosen = tuple(example for group in self._with_signal(groups) for example in group)
            self.position = self._position_after(task_batch, update)
            if update == 0:
                more = sum(map(len, generated.discarded))
                self.position = replace(self.position, num_rollouts=self.position.num_rollouts + more)
            is_last = update == num_updates - 1
            yield Batch(chosen, task_batch.epoch, task_batch.step + update, metrics, is_last)
            metrics = metrics | {name: 0.0 for name in COSTS if name in metrics}

    def _with_signal(self, groups: Sequence[list[Example]]) -> Sequence[list[Example]]:
        """Leave out groups without signal, if they are to be; a step of nothing else keeps them."""
        if self.config.rollouts.uniform_groups == "keep":
            return groups
        return [g for g in groups if not is_uniform([example.rollout for example in g])] or groups

    def _signal_metrics(self, generated: RolloutGroups) -> dict[str, float]:
        """Return the tokens of all rollouts of a batch, and how many groups were attempted again and left out."""
        every = [rollout for group in (*generated.groups, *generated.discarded) for rollout in group]
        metrics = {"rollout/num_tokens": float(sum(len(r.completion.token_ids) for r in every))}
        if self.config.rollouts.uniform_groups == "keep":
            return metrics
        return metrics | {
            "rollout/resampled_groups": float(len(generated.discarded)),
            "rollout/uniform_groups": float(sum(map(is_uniform, generated.groups))),
        }

    def _position_after(self, batch: TaskBatch, update: int) -> Position:
        """Return the position after one of the optimizer steps of a batch."""
        step, num_tasks = batch.step + update + 1, len(batch.tasks[update :: batch.num_updates])
        num_rollouts = self.position.num_rollouts + num_tasks * self.config.rollouts.group_size
        steps_left = batch.num_updates - update - 1
        owed = [task.task_id for n, task in enumerate(batch.tasks) if n % batch.num_updates > update]
        if batch.num_begun == batch.num_in_epoch and not owed:
            return Position(batch.epoch + 1, step, num_rollouts=num_rollouts)
        return Position(batch.epoch, step, batch.num_begun, tuple(owed), steps_left, num_rollouts)

    def _recall(
        self, tasks: Sequence[Task], groups: Sequence[list[Rollout]], draws: Sequence[Random]
    ) -> list[Recalled]:
        """Ask the memory about all tasks of a batch at once."""
        if self.memory is None:
            return [Recalled()] * len(tasks)
        questions = [
            Question(task, draw.getrandbits(62), group[0].group_id if self.config.memory.replay else None)
            for task, group, draw in zip(tasks, groups, draws, strict=True)
        ]
        return self.memory.recall(questions)

    def _examples(self, task: Task, group: list[Rollout], recalled: Recalled, random: Random) -> list[Example]:
        """Give each scored rollout of a group its advantage and its teacher context."""
        items, past_success, generation = recalled.items, recalled.past_success, recalled.generation
        contexts = self.contexts.build(task, group, items, past_success, generation, random)
        advantages = group_advantages(
            rewards=torch.tensor([r.verdict.reward for r in group]),
            group_index=torch.zeros(len(group), dtype=torch.long),
            normalize_std=self.config.objective.normalize_std,
            valid=torch.tensor([r.verdict.scored for r in group]),
        ).tolist()
        rows = zip(group, advantages, contexts, strict=True)
        return [Example(rollout, advantage, context) for rollout, advantage, context in rows if rollout.verdict.scored]


class RolloutStream(IterableDataset):
    """What Lightning loops over in one epoch. Without a length, Lightning would generate one batch ahead."""

    def __init__(self, data: RolloutDataModule):
        self.data, self.start = data, data.position

    def __len__(self) -> int:
        return sum(batch.num_updates for batch in self.data.task_batches(self.start))

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so that the position is read when the first batch is asked for, not when Lightning prepares.
        for batch in self.data.rest_of_epoch(self.data.position):
            yield batch
            if self.data.between_batches is not None:
                self.data.between_batches()


def digest_of(tasks: Mapping[Split, Sequence[Task]]) -> str:
    """Return a digest of the training and validation tasks: a position and a memory make sense for these tasks only."""
    sha256 = hashlib.sha256()
    for split in ("train", "validation"):
        for task in tasks[split]:
            sha256.update(repr(task).encode(errors="replace") + b"\0")
    return sha256.hexdigest()


def refuse_long_prompts(tasks: Mapping[Split, Sequence[Task]], prompts: PromptFormat, max_tokens: int) -> int:
    """Refuse tasks whose prompt is too long, before any weights load; return the length of the longest prompt.

    Prompts are never truncated.

    Raises:
        ConfigError: names the tasks and the length of the longest prompt.
    """
    lengths = {task.task_id: len(prompts.student(task)) for split in tasks.values() for task in split}
    too_long = [task_id for task_id, length in lengths.items() if length > max_tokens]
    if too_long:
        shown = ", ".join(too_long[:5]) + (", ..." if len(too_long) > 5 else "")
        raise ConfigError(
            f"rollouts.max_prompt_tokens={max_tokens} is exceeded by {len(too_long)} of {len(lengths)} tasks "
            f"({shown}); the longest prompt has {max(lengths.values())} tokens: raise it, or leave these tasks out."
        )
    return max(lengths.values(), default=0)


def _result_of(pending: Future[RolloutGroups]) -> RolloutGroups:
    """Wait for rollouts that another thread generates; note how much of their time has passed before."""
    started = time.perf_counter()
    generated = pending.result()
    waited_s = time.perf_counter() - started
    return replace(generated, overlap_s=max(0.0, generated.generate_s + generated.verify_s - waited_s))


def _rollout_metrics(groups: list[list[Rollout]]) -> dict[str, float]:
    """Return the metrics of one rollout batch."""
    rollouts = [rollout for group in groups for rollout in group]
    scored = [r for r in rollouts if r.verdict.scored]
    mixed = sum(0 < sum(r.verdict.correct for r in group) < len(group) for group in groups)
    lengths = [len(r.completion.token_ids) for r in rollouts]
    shares = [r.verdict.tests.share for r in rollouts if r.verdict.tests]
    passed_tests = {"rollout/passed_tests": sum(shares) / len(shares)} if shares else {}
    return passed_tests | {
        "rollout/reward": sum(r.verdict.reward for r in scored) / max(1, len(scored)),
        "rollout/solved_groups": sum(any(r.verdict.correct for r in group) for group in groups) / len(groups),
        "rollout/mixed_groups": mixed / len(groups),
        "rollout/unscored": float(len(rollouts) - len(scored)),
        "rollout/truncated": sum(r.completion.finish_reason == "length" for r in rollouts) / len(rollouts),
        "rollout/mean_length": sum(lengths) / len(lengths),
    }
