"""Attempt and verify: prompts go to the engine, completions come back as verified rollouts.

Training, evaluation and anything else that wants rollouts come through here. Each completion is verified as it
arrives, while the engine still holds others.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from pmd.errors import EngineError
from pmd.models.policy import Role
from pmd.rollouts.engine import Engine, Request, Sampling
from pmd.seeds import derive_seed
from pmd.types import Completion, Rollout, Task
from pmd.verifiers import verify


@dataclass(frozen=True, slots=True)
class Attempts:
    """The groups of rollouts, in the order of the tasks, and where the time went."""

    groups: list[list[Rollout]]
    generate_s: float
    verify_s: float

    @property
    def rollouts(self) -> list[Rollout]:
        """All rollouts, group after group."""
        return [rollout for group in self.groups for rollout in group]


def attempt(
    engine: Engine,
    prompts: Sequence[tuple[Task, Sequence[int]]],
    num_samples: int,
    sampling: Sampling,
    key: str,
    role: Role = "student",
) -> Attempts:
    """Attempt each task `num_samples` times and verify every attempt.

    `key` names the occasion (run seed, epoch, step, ...): seeds and rollout ids derive from it.

    Raises:
        EngineError: a completion is missing, empty, or came twice.
    """
    started, verify_s = time.perf_counter(), 0.0
    where = [(task, tuple(ids), sample) for task, ids in prompts for sample in range(num_samples)]
    requests = [Request(ids, derive_seed(key, task.task_id, sample)) for task, ids, sample in where]
    rollouts: list[Rollout | None] = [None] * len(where)
    arrivals = tqdm(
        engine.generate(requests, sampling, role), total=len(requests), desc="rollouts", leave=False, delay=2.0
    )
    for position, completion in arrivals:
        _check(completion, rollouts[position], requests[position])
        task, ids, sample = where[position]
        verifying = time.perf_counter()
        verdict = verify(task, completion.text)
        verify_s += time.perf_counter() - verifying
        group_id = f"{key}/{task.task_id}"
        rollouts[position] = Rollout(f"{group_id}#{sample}", group_id, task.task_id, ids, completion, verdict)
    complete = [rollout for rollout in rollouts if rollout is not None]
    if len(complete) != len(requests):
        raise EngineError(f"the engine returned {len(complete)} of {len(requests)} completions; nothing was scored.")
    groups = [complete[start : start + num_samples] for start in range(0, len(complete), num_samples)]
    return Attempts(groups, time.perf_counter() - started - verify_s, verify_s)


def _check(completion: Completion, earlier: Rollout | None, request: Request) -> None:
    """Refuse a completion that was not generated once and whole."""
    if earlier is not None:
        raise EngineError(f"the engine returned rollout {earlier.rollout_id} twice.")
    if not completion.token_ids or len(completion.token_ids) != len(completion.logprobs):
        raise EngineError(
            f"the engine returned {len(completion.token_ids)} tokens with {len(completion.logprobs)} log-probs "
            f"for a prompt of {len(request.prompt_ids)} tokens; both must be equal and above 0."
        )
