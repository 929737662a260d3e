"""The `Engine` protocol: what the trainer needs from anything that generates completions.

`HFEngine` (hf.py) generates with the training weights; engines with a copy of their own receive the weights in `sync`.
Each request carries its own seed, so a completion depends on its prompt, its seed and the policy, never on the rest of
the batch.
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

        An engine that holds another role's weights loads those of `role` first.

        Raises:
            EngineError: the engine failed, or returned an empty, truncated or invalid completion.
        """
        ...

    def sync(self, policy_version: int) -> None:
        """Load the student's current weights and label them `policy_version`."""
        ...

    def sleep(self) -> None:
        """Free the GPU memory that training needs."""
        ...

    def wake(self) -> None:
        """Get ready to generate again."""
        ...

    def close(self) -> None:
        """Release all resources."""
        ...
