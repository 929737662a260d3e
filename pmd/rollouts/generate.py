"""Generates rollouts: the engine completes prompts, verifiers judge each completion as it arrives.

Training and evaluation both come through here. Verifiers that take longer than a moment run in threads of their own
while the engine goes on generating.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from tqdm.auto import tqdm

from pmd.config.schema import VerifiersConfig
from pmd.engines.base import Engine, Request, Sampling
from pmd.errors import EngineError
from pmd.seeds import derive_seed
from pmd.types import Completion, Rollout, Task, Verdict
from pmd.verifiers.pool import VerificationPool, Verified


@dataclass(frozen=True, slots=True)
class RolloutGroups:
    """The groups of rollouts, in the order of the tasks, and where the time went."""

    groups: list[list[Rollout]]
    generate_s: float
    verify_s: float  # spent waiting for verdicts: what verification costs beyond generation
    num_hung: int = 0  # verifications given up at their deadline

    @property
    def policy_version(self) -> int:
        """Version of the oldest weights that generated any of them."""
        return min(rollout.completion.policy_version for rollout in self.rollouts)

    @property
    def rollouts(self) -> list[Rollout]:
        """All rollouts, group after group."""
        return [rollout for group in self.groups for rollout in group]


def generate_rollouts(
    engine: Engine,
    prompts: Sequence[tuple[Task, Sequence[int]]],
    num_samples: int,
    sampling: Sampling,
    key: str,
    verifiers: VerifiersConfig,
) -> RolloutGroups:
    """Attempt each task `num_samples` times and verify every attempt.

    `key` names the occasion (run seed, epoch, step, ...): seeds and rollout ids derive from it.

    Raises:
        EngineError: a completion is missing, empty, or came twice.
    """
    started, verify_s = time.perf_counter(), 0.0
    where = [(task, tuple(ids), sample) for task, ids in prompts for sample in range(num_samples)]
    requests = [Request(ids, derive_seed(key, task.task_id, sample)) for task, ids, sample in where]
    answers: list[tuple[Completion, Future[Verdict] | Verified] | None] = [None] * len(where)
    with VerificationPool(verifiers.workers, verifiers.deadline_s) as pool:
        arrivals = tqdm(
            engine.generate(requests, sampling), total=len(requests), desc="rollouts", leave=False, delay=2.0
        )
        for position, completion in arrivals:
            task, _, sample = where[position]
            _check(completion, requests[position], f"{key}/{task.task_id}#{sample}", is_second=answers[position])
            submitting = time.perf_counter()
            answers[position] = completion, pool.submit(task, completion.text)
            verify_s += time.perf_counter() - submitting
        complete = [answer for answer in answers if answer is not None]
        if len(complete) != len(requests):
            raise EngineError(
                f"the engine returned {len(complete)} of {len(requests)} completions; nothing was scored."
            )
        waiting = time.perf_counter()
        rollouts = [
            _rollout(key, *place, completion, verdict.result())
            for place, (completion, verdict) in zip(where, complete, strict=True)
        ]
        verify_s += time.perf_counter() - waiting
    groups = [rollouts[start : start + num_samples] for start in range(0, len(rollouts), num_samples)]
    return RolloutGroups(groups, time.perf_counter() - started - verify_s, verify_s, pool.num_hung)


def _rollout(
    key: str, task: Task, ids: tuple[int, ...], sample: int, completion: Completion, verdict: Verdict
) -> Rollout:
    group_id = f"{key}/{task.task_id}"
    return Rollout(f"{group_id}#{sample}", group_id, task.task_id, ids, completion, verdict)


def _check(completion: Completion, request: Request, rollout_id: str, *, is_second: object) -> None:
    """Refuse a completion that was not generated once and whole."""
    if is_second:
        raise EngineError(f"the engine returned rollout {rollout_id} twice.")
    if not completion.token_ids or len(completion.token_ids) != len(completion.logprobs):
        raise EngineError(
            f"the engine returned {len(completion.token_ids)} tokens with {len(completion.logprobs)} log-probs "
            f"for a prompt of {len(request.prompt_ids)} tokens; both must be equal and above 0."
        )
