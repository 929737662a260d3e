"""Held-out evaluation: sample the policy without any memory, or with memory in its prompt to see what is left to learn.

Works without Lightning; `metrics.py` turns the samples into scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pmd.config.schema import RunConfig, VerificationConfig, VerifiersConfig
from pmd.engines.base import Engine, Sampling
from pmd.errors import VerificationError
from pmd.evaluation.chance import chance_scores
from pmd.evaluation.metrics import Sample
from pmd.memory import ProceduralMemory
from pmd.rollouts.generate import generate_rollouts
from pmd.seeds import derive_seed
from pmd.teacher import ContextBuilder
from pmd.types import UNSCORED, Task, Verdict


@dataclass(frozen=True, slots=True)
class Evaluator:
    """How a run evaluates: fixed once, so that all evaluations of a run and of its rivals are alike."""

    engine: Engine
    contexts: ContextBuilder  # the prompt format, and the bounds of a prompt that holds memory
    config: VerificationConfig
    verifiers: VerifiersConfig
    max_new_tokens: int
    seed: int

    def memory_free(self, tasks: Sequence[Task], num_samples: int) -> list[Sample]:
        """Score the policy as it will be used: the task alone in its prompt."""
        return self._score([(task, self.contexts.prompts.student(task)) for task in tasks], num_samples)

    def memory_conditioned(self, tasks: Sequence[Task], num_samples: int, memory: ProceduralMemory) -> list[Sample]:
        """Score the policy with retrieved memory in its prompt. Nothing is logged as used, nothing is written."""
        prompts = []
        for task in tasks:
            items = memory.retrieve(task, seed=derive_seed(self.seed, "evaluate", task.task_id))
            prompts.append((task, self.contexts.memory_prompt(task, items)))
        return self._score(prompts, num_samples)

    def _score(self, prompts: Sequence[tuple[Task, Sequence[int]]], num_samples: int) -> list[Sample]:
        """Sample with seeds that depend on the task alone, so that two policies are compared on the same draws."""
        sampling = Sampling(self.config.temperature, self.max_new_tokens, self.config.top_p)
        rollouts = generate_rollouts(
            self.engine, prompts, num_samples, sampling, f"{self.seed}/evaluate", self.verifiers
        )
        samples = [
            sample_of(task, rollout.verdict)
            for (task, _), group in zip(prompts, rollouts.groups, strict=True)
            for rollout in group
        ]
        if all(sample.status in UNSCORED for sample in samples):
            raise VerificationError(
                f"not one of {len(samples)} completions could be verified: each verdict is sandbox_error or error; "
                "the warnings above say why."
            )
        return samples


def evaluation_facts(config: RunConfig, tasks: Sequence[Task]) -> dict[str, Any]:
    """Return what one must know to compare results: sampling, the scorer of programs, and what guessing scores."""
    verification = config.verification
    scorers = sorted({task.tests.get("scorer", "lcb") for task in tasks if task.verifier == "code"})
    return {
        "sampling": {"temperature": verification.temperature, "top_p": verification.top_p},
        "scorer": ", ".join(scorers) or None,
        "chance": chance_scores(tasks, verification.pass_at),
    }


def sample_of(task: Task, verdict: Verdict) -> Sample:
    """Return what the metrics need of one verified completion."""
    return Sample(
        task.task_id, task.domain, verdict.correct, verdict.reward, verdict.answer, verdict.status, verdict.tests
    )
