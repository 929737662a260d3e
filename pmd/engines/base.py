"""What the trainer asks of whatever generates: token ids in, completions with token ids and log-probs out.

`HFEngine` (rollouts/hf.py) generates with the training weights; engines that hold their own copy take the weights in
`sync`. Requests carry their own seeds, so a completion depends on its prompt, its seed and the policy, never on what
else was in the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pmd.types import Completion, Role


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to generate."""

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. Temperature 0 is greedy."""

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0


class Engine(Protocol):
    """Generates completions under one version of the policy."""

    policy_version: int

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, role: Role = "student"
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (position in `requests`, completion) as completions finish, each position exactly once.

        Raises:
            EngineError: the engine died or returned something that was not generated.
        """
        ...

    def sync(self, policy_version: int) -> None:
        """Take over the student's current weights and call them `policy_version`."""
        ...

    def sleep(self) -> None:
        """Free what training needs."""
        ...

    def wake(self) -> None:
        """Be ready to generate again."""
        ...

    def close(self) -> None:
        """Release everything."""
        ...
