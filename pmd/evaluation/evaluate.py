"""Held-out evaluation: sample the policy without any memory, or with memory in its prompt to see what is left to learn.

Enters: an engine, tasks, a prompt format. Leaves: samples for `metrics.py`. Works without Lightning.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pmd.config import VerificationConfig
from pmd.evaluation.metrics import Sample
from pmd.memory.memory import ProceduralMemory
from pmd.prompts.format import PromptFormat
from pmd.rollouts.attempt import attempt
from pmd.rollouts.engine import Engine, Sampling
from pmd.seeds import derive_seed
from pmd.types import Task


@dataclass(frozen=True, slots=True)
class Evaluator:
    """How a run evaluates: fixed once, so that all evaluations of a run and of its rivals are alike."""

    engine: Engine
    prompts: PromptFormat
    config: VerificationConfig
    max_new_tokens: int
    seed: int

    def memory_free(self, tasks: Sequence[Task], num_samples: int) -> list[Sample]:
        """Score the policy as it will be used: the task alone in its prompt."""
        return self._score([(task, self.prompts.student(task)) for task in tasks], num_samples)

    def memory_conditioned(self, tasks: Sequence[Task], num_samples: int, memory: ProceduralMemory) -> list[Sample]:
        """Score the policy with retrieved memory in its prompt. Nothing is logged as used, nothing is written."""
        prompts = []
        for task in tasks:
            items = memory.retrieve(task, seed=derive_seed(self.seed, "evaluate", task.task_id))
            prompts.append((task, self.prompts.teacher(task, [item.text for item in items], None, None)))
        return self._score(prompts, num_samples)

    def _score(self, prompts: list[tuple[Task, list[int]]], num_samples: int) -> list[Sample]:
        """Sample with seeds that depend on the task alone, so that two policies are compared on the same draws."""
        sampling = Sampling(self.config.temperature, self.max_new_tokens, self.config.top_p)
        attempts = attempt(self.engine, prompts, num_samples, sampling, f"{self.seed}/evaluate")
        return [
            Sample(task.task_id, task.domain, rollout.verdict.correct, rollout.verdict.reward, rollout.verdict.answer)
            for (task, _), group in zip(prompts, attempts.groups, strict=True)
            for rollout in group
            if rollout.verdict.scored
        ]
