"""Generates rollouts: the engine completes prompts, and verifiers judge each completion as it arrives.

Training and evaluation both use it. Slow verifiers run in threads while the engine keeps generating.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from tqdm.auto import tqdm

from pmd.config.schema import VerifiersConfig
from pmd.engines.base import Engine, Request, Sampling
from pmd.errors import EngineError
from pmd.ranks import Ranks
from pmd.seeds import derive_seed
from pmd.types import Completion, Rollout, Task, Verdict
from pmd.verifiers.pool import VerificationPool, Verified


@dataclass(frozen=True, slots=True)
class RolloutGroups:
    """Groups of rollouts, one for each task, and the time they took."""

    groups: list[list[Rollout]]  # in the order of the tasks
    generate_s: float
    verify_s: float  # time spent waiting for verdicts, beyond generation
    num_hung: int = 0  # verifications that were abandoned at their deadline
    overlap_s: float = 0.0  # of both, what passed before training asked for the rollouts (`rollouts.prefetch`)
    discarded: tuple[list[Rollout], ...] = ()  # groups that others replace, in the order in which they were generated

    @property
    def policy_version(self) -> int:
        """Version of the oldest weights that generated any of them."""
        return min(rollout.completion.policy_version for rollout in self.rollouts)

    @property
    def rollouts(self) -> list[Rollout]:
        """All rollouts, group after group."""
        return [rollout for group in self.groups for rollout in group]

    @property
    def first_groups(self) -> list[list[Rollout]]:
        """The first group of each task, whether it was kept or replaced."""
        first = {group[0].task_id: group for group in reversed(self.discarded)}
        return [first.get(group[0].task_id, group) for group in self.groups]

    def replaced(self, positions: Sequence[int], more: "RolloutGroups") -> "RolloutGroups":
        """Return these groups with those of `more` at `positions`, and the costs of both."""
        groups = list(self.groups)
        for position, group in zip(positions, more.groups, strict=True):
            groups[position] = group
        return RolloutGroups(
            groups,
            self.generate_s + more.generate_s,
            self.verify_s + more.verify_s,
            self.num_hung + more.num_hung,
            discarded=(*self.discarded, *(self.groups[position] for position in positions)),
        )


def is_uniform(group: Sequence[Rollout]) -> bool:
    """Whether all scored attempts of a group have the same reward, so that every advantage is 0."""
    return len({rollout.verdict.reward for rollout in group if rollout.verdict.scored}) < 2


@dataclass(frozen=True, slots=True)
class Attempt:
    """One rollout to generate: the student's `sample`-th attempt at a task."""

    task: Task
    prompt_ids: tuple[int, ...]
    group_id: str
    sample: int

    @property
    def rollout_id(self) -> str:
        """The group's id and the attempt's number."""
        return f"{self.group_id}#{self.sample}"

    def rollout(self, completion: Completion, verdict: Verdict) -> Rollout:
        """Return the finished attempt as a rollout."""
        return Rollout(self.rollout_id, self.group_id, self.task.task_id, self.prompt_ids, completion, verdict)


def generate_rollouts(
    engine: Engine,
    prompts: Sequence[tuple[Task, Sequence[int]]],
    num_samples: int,
    sampling: Sampling,
    key: str,
    verifiers: VerifiersConfig,
) -> RolloutGroups:
    """Attempt each task `num_samples` times and verify every attempt.

    Args:
        prompts: each task with the prompt's token ids.
        key: identifies this batch (run seed, epoch, step, ...); seeds and rollout ids are derived from it.

    Raises:
        EngineError: a completion is missing or empty, or arrived twice.
    """
    started, verify_s = time.perf_counter(), 0.0
    attempts = [
        Attempt(task, tuple(prompt_ids), f"{key}/{task.task_id}", sample)
        for task, prompt_ids in prompts
        for sample in range(num_samples)
    ]
    requests = [Request(a.prompt_ids, derive_seed(key, a.task.task_id, a.sample)) for a in attempts]
    judged: dict[int, tuple[Completion, Future[Verdict] | Verified]] = {}  # by position in `requests`
    with VerificationPool(verifiers.workers, verifiers.deadline_s) as pool:
        arriving = engine.generate(requests, sampling)
        for position, completion in tqdm(
            arriving, total=len(requests), desc="rollouts", leave=False, delay=2.0, disable=None
        ):
            attempt = attempts[position]
            if position in judged:
                raise EngineError(f"the engine returned rollout {attempt.rollout_id} twice.")
            _check_whole(completion, requests[position])
            submitted = time.perf_counter()
            judged[position] = completion, pool.submit(attempt.task, completion.text)
            verify_s += time.perf_counter() - submitted
        if len(judged) != len(requests):
            raise EngineError(f"the engine returned {len(judged)} of {len(requests)} completions; none were scored.")
        waiting = time.perf_counter()
        rollouts = []
        for position, attempt in enumerate(attempts):
            completion, verdict = judged[position]
            rollouts.append(attempt.rollout(completion, verdict.result()))
        verify_s += time.perf_counter() - waiting
    groups = [rollouts[start : start + num_samples] for start in range(0, len(rollouts), num_samples)]
    return RolloutGroups(groups, time.perf_counter() - started - verify_s, verify_s, pool.num_hung)


def gather_rollouts(ranks: Ranks, own: RolloutGroups) -> RolloutGroups:
    """Return on every rank the groups that all of them generated, in the order of the tasks they were shared out by."""
    groups, costs = ranks.gathered(own.groups), ranks.all(replace(own, groups=[]))
    return RolloutGroups(
        groups,
        max(part.generate_s for part in costs),
        max(part.verify_s for part in costs),
        sum(part.num_hung for part in costs),
        max(part.overlap_s for part in costs),
        tuple(group for part in costs for group in part.discarded),
    )


def _check_whole(completion: Completion, request: Request) -> None:
    """Refuse a completion that is empty or lacks log-probs."""
    if not completion.token_ids or len(completion.token_ids) != len(completion.logprobs):
        raise EngineError(
            f"the engine returned {len(completion.token_ids)} tokens with {len(completion.logprobs)} log-probs "
            f"for a prompt of {len(request.prompt_ids)} tokens; both must be equal and above 0."
        )
