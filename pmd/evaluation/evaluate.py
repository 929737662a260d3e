"""Held-out evaluation: samples the policy without memory, or with memory in its prompt to see what it has yet to learn.

It works without Lightning; `metrics.py` turns the samples into scores.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pmd.config.schema import RunConfig, VerificationConfig, VerifiersConfig
from pmd.engines.base import Engine, Sampling
from pmd.errors import VerificationError
from pmd.evaluation.metrics import Sample, chance_scores
from pmd.memory import Question, ReadableMemory
from pmd.ranks import Ranks
from pmd.rollouts.generate import gather_rollouts, generate_rollouts
from pmd.seeds import derive_seed
from pmd.teacher import ContextBuilder
from pmd.types import UNSCORED, Rollout, Task, Verdict

Keep = Callable[[Rollout], None]  # is given every rollout of an evaluation, for a table to read

#: Words of memory and of its prompts. Used without any memory in sight, they are a trace of what was internalized.
PROCEDURAL = re.compile(
    r"\b(strateg(?:y|ies)|lessons?|insights?|behaviou?rs?|patterns?|contrasts?|procedures?|heuristics?|principles?)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Evaluator:
    """How a run evaluates: fixed once, so that evaluations are comparable within a run and between runs."""

    engine: Engine
    contexts: ContextBuilder  # the prompt format, and the limits on a prompt that contains memory
    config: VerificationConfig
    verifiers: VerifiersConfig
    max_new_tokens: int
    seed: int
    ranks: Ranks | None = None  # of a run on several devices: each evaluates a share of the tasks

    def memory_free(self, tasks: Sequence[Task], num_samples: int, keep: Keep | None = None) -> list[Sample]:
        """Sample the policy as it will be used, with nothing but the task in its prompt."""
        return self._sample([(task, self.contexts.prompts.student(task)) for task in tasks], num_samples, keep)

    def memory_conditioned(
        self,
        tasks: Sequence[Task],
        num_samples: int,
        memory: ReadableMemory,
        keep: Keep | None = None,
    ) -> list[Sample]:
        """Sample the policy with retrieved memory in its prompt; the memory is only read."""
        questions = [Question(task, derive_seed(self.seed, "evaluate", task.task_id)) for task in tasks]
        answers = zip(tasks, memory.recall(questions), strict=True)
        prompts = [(task, self.contexts.memory_prompt(task, recalled.items)) for task, recalled in answers]
        return self._sample(prompts, num_samples, keep)

    def _sample(
        self, prompts: Sequence[tuple[Task, Sequence[int]]], num_samples: int, keep: Keep | None
    ) -> list[Sample]:
        """Sample with seeds that depend on the task alone, so that policies are compared on the same random draws."""
        sampling = Sampling(self.config.temperature, self.max_new_tokens, self.config.top_p)
        own = prompts if self.ranks is None else self.ranks.share(prompts)
        rollouts = generate_rollouts(self.engine, own, num_samples, sampling, f"{self.seed}/evaluate", self.verifiers)
        if self.ranks is not None:
            rollouts = gather_rollouts(self.ranks, rollouts)
        if keep is not None:
            for rollout in (rollout for group in rollouts.groups for rollout in group):
                keep(rollout)
        samples = [
            sample_of(task, rollout.verdict, rollout.completion.text)
            for (task, _), group in zip(prompts, rollouts.groups, strict=True)
            for rollout in group
        ]
        if all(sample.status in UNSCORED for sample in samples):
            raise VerificationError(
                f"none of the {len(samples)} completions could be verified: every verdict is sandbox_error or error; "
                "the warnings above say why."
            )
        return samples


def evaluation_facts(config: RunConfig, tasks: Sequence[Task]) -> dict[str, Any]:
    """Return what a comparison of results depends on: sampling, how answers are read, and the score of guessing."""
    verification = config.verification
    choices = {"code": ("scorer", "lcb"), "tool_use": ("reading", "sdpo")}
    scorers = sorted({task.tests.get(*choices[task.verifier]) for task in tasks if task.verifier in choices})
    return {
        "sampling": {"temperature": verification.temperature, "top_p": verification.top_p},
        "scorer": ", ".join(scorers) or None,
        "chance": chance_scores(tasks, verification.pass_at),
    }


def sample_of(task: Task, verdict: Verdict, text: str = "") -> Sample:
    """Return the fields of a verified completion that the metrics need."""
    return Sample(
        task.task_id,
        task.domain,
        verdict.correct,
        verdict.reward,
        verdict.answer,
        verdict.status,
        verdict.tests,
        num_words=len(text.split()),
        num_procedural_words=len(PROCEDURAL.findall(text)),
    )
