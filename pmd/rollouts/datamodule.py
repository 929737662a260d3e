"""The stream of training batches: task -> group of rollouts -> verdicts -> teacher context -> batch.

Rollouts are generated inside the loader's `__next__` and nowhere else, so each batch is as fresh as the weights.
Memory is only read here; it changes at epoch ends, in the callbacks.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from random import Random

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, IterableDataset

from pmd.batch import Batch, Example
from pmd.config.schema import RunConfig
from pmd.engines.base import Engine, Sampling
from pmd.errors import ConfigError
from pmd.losses.policy_gradient import group_advantages
from pmd.memory import ProceduralMemory
from pmd.rollouts.generate import RolloutGroups, generate_rollouts
from pmd.seeds import derive_seed
from pmd.tasks.prompts.base import PromptFormat
from pmd.teacher import ContextBuilder
from pmd.types import Rollout, Split, Task

#: Metrics of a whole rollout batch; logged with its first optimizer step, and 0 with the others.
COSTS = ("rollout/num_tokens", "time/rollout_s", "time/verify_s", "time/context_s")


@dataclass(frozen=True, slots=True)
class TaskBatch:
    """The tasks of one rollout batch."""

    tasks: Sequence[Task]
    epoch: int
    step: int  # of the run: its first optimizer step
    key: str  # identifies the batch; seeds and rollout ids are derived from it


class RolloutDataModule(LightningDataModule):
    """Streams fresh, verified rollouts with their teacher contexts; one epoch visits every training task once."""

    def __init__(
        self,
        config: RunConfig,
        tasks: Mapping[Split, Sequence[Task]],
        engine: Engine,
        prompts: PromptFormat,
        memory: ProceduralMemory | None,
    ):
        super().__init__()
        self.config = config
        self.tasks = tasks
        self.engine = engine
        self.prompts = prompts
        self.memory = memory
        self.contexts = ContextBuilder(prompts, config.teacher, config.memory.max_tokens)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training tasks."""
        num_batches = -(-len(self.tasks["train"]) // self.config.rollouts.tasks_per_step)
        return num_batches * self.config.rollouts.updates_per_batch

    def train_dataloader(self) -> DataLoader:
        """Return the stream; nothing is generated before it is iterated over."""
        return DataLoader(RolloutStream(self), batch_size=None, num_workers=0)

    def epoch(self, epoch: int, num_done: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch, one for each optimizer step.

        Args:
            num_done: steps of this epoch to skip, because they were taken before the run was resumed.
        """
        skipped_batches, skipped_steps = divmod(num_done, self.config.rollouts.updates_per_batch)
        remaining = self._task_batches(epoch)[skipped_batches:]
        for task_batch, generated in zip(remaining, self._generate_all(remaining), strict=True):
            yield from islice(self._training_batches(task_batch, generated), skipped_steps, None)
            skipped_steps = 0

    def _task_batches(self, epoch: int) -> list[TaskBatch]:
        """Shuffle the training tasks and divide them into rollout batches."""
        rollouts, seed = self.config.rollouts, self.config.seed_everything
        tasks = list(self.tasks["train"])
        Random(derive_seed(seed, "order", epoch)).shuffle(tasks)
        batches = []
        for number, start in enumerate(range(0, len(tasks), rollouts.tasks_per_step)):
            step = epoch * self.steps_per_epoch + number * rollouts.updates_per_batch
            chosen = tasks[start : start + rollouts.tasks_per_step]
            batches.append(TaskBatch(chosen, epoch, step, f"{seed}/train/{epoch}/{step}"))
        return batches

    def _generate_all(self, task_batches: Sequence[TaskBatch]) -> Iterator[RolloutGroups]:
        """Yield the rollouts of each batch; with `rollouts.prefetch` the next ones are generated meanwhile."""
        if not self.config.rollouts.prefetch:
            yield from map(self._generate, task_batches)
            return
        pool, pending = ThreadPoolExecutor(1), None
        try:
            for upcoming in [*task_batches, None]:
                generated = None if pending is None else pending.result()
                pending = None if upcoming is None else pool.submit(self._generate, upcoming)
                if generated is not None:
                    yield generated
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _generate(self, batch: TaskBatch) -> RolloutGroups:
        """Have the student attempt every task of the batch, without any memory in its prompt."""
        config = self.config.rollouts
        prompts = [(task, self.prompts.student(task)) for task in batch.tasks]
        sampling = Sampling(config.temperature, config.max_new_tokens)
        return generate_rollouts(self.engine, prompts, config.group_size, sampling, batch.key, self.config.verifiers)

    def _training_batches(self, task_batch: TaskBatch, generated: RolloutGroups) -> Iterator[Batch]:
        """Divide one rollout batch, by group, into a training batch for each of its optimizer steps."""
        started = time.perf_counter()
        examples = [
            self._examples(task, group, Random(derive_seed(task_batch.key, task.task_id, "context")))
            for task, group in zip(task_batch.tasks, generated.groups, strict=True)
        ]
        metrics = _rollout_metrics(generated.groups) | {
            "rollout/hung": float(generated.num_hung),
            "rollout/versions_behind": float(self.engine.policy_version - generated.policy_version),
            "time/rollout_s": generated.generate_s,
            "time/verify_s": generated.verify_s,
            "time/context_s": time.perf_counter() - started,
        }
        num_updates = self.config.rollouts.updates_per_batch
        for update in range(num_updates):
            chosen = tuple(example for group in examples[update::num_updates] for example in group)
            yield Batch(chosen, task_batch.epoch, task_batch.step + update, metrics)
            metrics = metrics | dict.fromkeys(COSTS, 0.0)

    def _examples(self, task: Task, group: list[Rollout], random: Random) -> list[Example]:
        """Give each scored rollout of a group its advantage and its teacher context."""
        items, past_success, generation = [], None, 0
        if self.memory is not None:
            items = self.memory.retrieve(task, seed=random.getrandbits(62))
            past_success = self.memory.past_success(task)
            generation = self.memory.generation
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
    """The iterable that Lightning loops over. Without a length, Lightning would generate one batch ahead."""

    def __init__(self, data: RolloutDataModule):
        self.data = data

    def __len__(self) -> int:
        return self.data.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        trainer = self.data.trainer
        assert trainer is not None
        # This is a generator because on resume Lightning creates the iterator before it has counted the finished epoch.
        # A run that trainer.max_steps or max_time stopped in the middle of an epoch resumes from there.
        num_done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        yield from self.data.epoch(trainer.current_epoch, num_done)


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
        "rollout/num_tokens": float(sum(lengths)),
        "rollout/mean_length": sum(lengths) / len(lengths),
    }
