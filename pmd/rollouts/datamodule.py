"""The stream of training batches: task -> group of rollouts -> verdicts -> teacher context -> batch.

A LightningDataModule whose loader generates inside `__next__` and nowhere else, so each batch is as fresh as the
weights. Memory is only read here; it changes at epoch ends, in the callbacks.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
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

#: What a rollout batch costs once, however many optimizer steps are taken on it.
COSTS = ("rollout/num_tokens", "time/rollout_s", "time/verify_s", "time/context_s")


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
        """Return the stream; building it generates nothing."""
        return DataLoader(RolloutStream(self), batch_size=None, num_workers=0)

    def epoch(self, epoch: int, num_done: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch, each generated when it is asked for, or one batch ahead (prefetch).

        Args:
            num_done: steps of this epoch that were taken already; they are left out.
        """
        rollouts, seed = self.config.rollouts, self.config.seed_everything
        tasks = list(self.tasks["train"])
        Random(derive_seed(seed, "order", epoch)).shuffle(tasks)
        size, step = rollouts.tasks_per_step, epoch * self.steps_per_epoch
        work: list[tuple[Sequence[Task], str]] = []
        for number, start in enumerate(range(0, len(tasks), size)):
            key = f"{seed}/train/{epoch}/{step + number * rollouts.updates_per_batch}"
            work.append((tasks[start : start + size], key))
        left = work[num_done // rollouts.updates_per_batch :]
        step += (len(work) - len(left)) * rollouts.updates_per_batch
        skipped = num_done % rollouts.updates_per_batch
        for (group, key), generated in zip(left, self._generate_all(left), strict=True):
            yield from islice(self._batches(generated, group, key, epoch, step), skipped, None)
            step, skipped = step + rollouts.updates_per_batch, 0

    def _generate_all(self, work: Sequence[tuple[Sequence[Task], str]]) -> Iterator[RolloutGroups]:
        """Yield the rollouts of each batch of tasks; with `rollouts.prefetch` the next are generated meanwhile."""
        if not self.config.rollouts.prefetch:
            for tasks, key in work:
                yield self._generate(tasks, key)
            return
        pool = ThreadPoolExecutor(1)
        try:
            ahead = pool.submit(self._generate, *work[0])
            for following in [*work[1:], None]:
                generated = ahead.result()
                if following is not None:
                    ahead = pool.submit(self._generate, *following)
                yield generated
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _generate(self, tasks: Sequence[Task], key: str) -> RolloutGroups:
        config = self.config.rollouts
        prompts = [(task, self.prompts.student(task)) for task in tasks]
        sampling = Sampling(config.temperature, config.max_new_tokens)
        return generate_rollouts(self.engine, prompts, config.group_size, sampling, key, self.config.verifiers)

    def _batches(
        self, generated: RolloutGroups, tasks: Sequence[Task], key: str, epoch: int, step: int
    ) -> Iterator[Batch]:
        """Split the rollouts of `tasks` among this rollout batch's optimizer steps."""
        config = self.config.rollouts
        started = time.perf_counter()
        examples = [
            self._examples(task, group, Random(derive_seed(key, task.task_id, "context")))
            for task, group in zip(tasks, generated.groups, strict=True)
        ]
        metrics = _rollout_metrics(generated.groups) | {
            "rollout/hung": float(generated.num_hung),
            "rollout/versions_behind": float(self.engine.policy_version - generated.policy_version),
            "time/rollout_s": generated.generate_s,
            "time/verify_s": generated.verify_s,
            "time/context_s": time.perf_counter() - started,
        }
        for update in range(config.updates_per_batch):
            share = examples[update :: config.updates_per_batch]
            yield Batch(tuple(e for group in share for e in group), epoch, step + update, metrics)
            metrics = metrics | dict.fromkeys(COSTS, 0.0)  # counted once, with the first step

    def _examples(self, task: Task, group: list[Rollout], random: Random) -> list[Example]:
        """Join each scored rollout of a group with its advantage and its teacher context."""
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
    """The iterable that Lightning loops over. It has a length, or Lightning would generate one batch ahead."""

    def __init__(self, data: RolloutDataModule):
        self.data = data

    def __len__(self) -> int:
        return self.data.steps_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        trainer = self.data.trainer
        assert trainer is not None
        # A generator: on resume Lightning makes the iterator before it has counted the finished epoch.
        # trainer.max_steps and max_time end a run within an epoch, which then goes on where it was left.
        num_done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        yield from self.data.epoch(trainer.current_epoch, num_done)


def refuse_long_prompts(tasks: Mapping[Split, Sequence[Task]], prompts: PromptFormat, max_tokens: int) -> None:
    """Refuse tasks whose prompt is too long, before any weights load. Nothing is ever cut.

    Raises:
        ConfigError: with the longest prompt and the ids of the tasks.
    """
    lengths = {task.task_id: len(prompts.student(task)) for split in tasks.values() for task in split}
    long = [task_id for task_id, length in lengths.items() if length > max_tokens]
    if long:
        shown = ", ".join(long[:5]) + (", ..." if len(long) > 5 else "")
        raise ConfigError(
            f"rollouts.max_prompt_tokens={max_tokens} is exceeded by {len(long)} of {len(lengths)} tasks ({shown}); "
            f"the longest prompt has {max(lengths.values())} tokens: raise it, or leave these tasks out."
        )


def _rollout_metrics(groups: list[list[Rollout]]) -> dict[str, float]:
    """Summarise one rollout batch."""
    rollouts = [rollout for group in groups for rollout in group]
    scored = [r for r in rollouts if r.verdict.scored]
    mixed = sum(0 < sum(r.verdict.correct for r in group) < len(group) for group in groups)
    lengths = [len(r.completion.token_ids) for r in rollouts]
    tested = [r.verdict.tests.share for r in rollouts if r.verdict.tests]
    passed_tests = {"rollout/passed_tests": sum(tested) / len(tested)} if tested else {}
    return passed_tests | {
        "rollout/reward": sum(r.verdict.reward for r in scored) / max(1, len(scored)),
        "rollout/solved_groups": sum(any(r.verdict.correct for r in group) for group in groups) / len(groups),
        "rollout/mixed_groups": mixed / len(groups),
        "rollout/unscored": float(len(rollouts) - len(scored)),
        "rollout/truncated": sum(r.completion.finish_reason == "length" for r in rollouts) / len(rollouts),
        "rollout/num_tokens": float(sum(lengths)),
        "rollout/mean_length": sum(lengths) / len(lengths),
    }
