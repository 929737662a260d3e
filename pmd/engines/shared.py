"""Shares out over the ranks what rank 0 alone asks for: reflections, behaviours, and the scores of audits.

Rank 0 leads: its `LeadingEngine` sends the requests to all ranks, each generates every n-th, and rank 0 collects the
completions. The others `follow` until rank 0 releases them. A completion depends on its request alone, so it does not
matter who generates it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pmd.engines.base import Engine, Request, Sampling
from pmd.ranks import Ranks
from pmd.scoring import PolicyScorer
from pmd.types import Completion, PromptAndCompletion, Role

Order = tuple[Sequence[Request], Sampling, Role]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Pairs:
    """An order to score prompts with completions."""

    pairs: Sequence[PromptAndCompletion]
    role: Role


@dataclass(frozen=True, slots=True)
class Release:
    """Ends the orders of rank 0."""

    result: Any


class LeadingEngine:
    """Rank 0's engine, with those of the ranks that follow."""

    def __init__(self, engine: Engine, ranks: Ranks):
        self.engine, self.ranks = engine, ranks

    @property
    def policy_version(self) -> int:
        """The version of rank 0's engine; all are synced together."""
        return self.engine.policy_version

    @policy_version.setter
    def policy_version(self, version: int) -> None:
        self.engine.policy_version = version

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, role: Role = "student"
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (position, completion) once all ranks have generated."""
        order: Order = (requests, sampling, role)
        self.ranks.from_first(lambda: order)
        completions = _generate_share(self.engine, self.ranks, order)
        yield from enumerate(completions)

    def release(self, result: T) -> T:
        """Let the other ranks go on, with a result; return it."""
        self.ranks.from_first(lambda: Release(result))
        return result

    def sync(self, policy_version: int) -> None:
        """Sync rank 0's engine."""
        self.engine.sync(policy_version)

    def sleep(self) -> None:
        """Put rank 0's engine to sleep; the others sleep while they score."""
        self.engine.sleep()

    def wake(self) -> None:
        """Wake rank 0's engine; the others wake when they generate."""
        self.engine.wake()

    def close(self) -> None:
        """Close rank 0's engine."""
        self.engine.close()


class LeadingScorer:
    """Rank 0's scorer where the ranks divide the weights: all of them score the same, as every pass needs all parts."""

    def __init__(self, scorer: PolicyScorer, ranks: Ranks):
        self.scorer, self.ranks = scorer, ranks

    def __call__(self, pairs: Sequence[PromptAndCompletion], role: Role) -> list[list[float]]:
        """Return the log-probs of each completion's tokens."""
        self.ranks.from_first(lambda: Pairs(pairs, role))
        return self.scorer(pairs, role)


class IdleEngine:
    """The engine of a rank for which another one generates: it is asked for nothing, and knows the version."""

    policy_version = 0

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, role: Role = "student"
    ) -> Iterator[tuple[int, Completion]]:
        """Yield nothing."""
        assert not requests
        yield from ()

    def sync(self, policy_version: int) -> None:
        """Note the version."""
        self.policy_version = policy_version

    def sleep(self) -> None:
        """Do nothing."""

    def wake(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def follow(engine: Engine, scorer: PolicyScorer, ranks: Ranks) -> Any:
    """Generate this rank's share of whatever rank 0 asks for, until it releases the ranks; return its result."""
    while True:
        order: Order | Pairs | Release = ranks.from_first(_never)
        if isinstance(order, Release):
            return order.result
        if isinstance(order, Pairs):
            engine.sleep()  # as rank 0's: the trainer's model needs the memory
            scorer(order.pairs, order.role)
        else:
            _generate_share(engine, ranks, order)


def _never() -> Any:
    raise AssertionError("rank 0 leads")


def _generate_share(engine: Engine, ranks: Ranks, order: Order) -> list[Completion]:
    requests, sampling, role = order
    own = ranks.share(requests)
    completions = dict(engine.generate(own, sampling, role)) if ranks.generates else {}
    return ranks.gathered([completions[position] for position in range(len(own))])
