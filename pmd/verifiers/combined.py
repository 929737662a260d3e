"""Adds up the rewards of several verifiers, each with its weight; the first decides whether a completion is right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pmd.tasks.thinking import MARK, strip_thinking
from pmd.types import Task, Verdict
from pmd.verifiers.reward import TRLReward, as_verdict


@dataclass(frozen=True, slots=True)
class Combined:
    """A verifier whose reward is the weighted sum of others'.

    Status, answer and whether the completion is right are the first one's; the feedback is everyone's. If one gives no
    verdict, there is none. One that returns None is not for this task, as in TRL, and is left out.
    """

    verifiers: Sequence[tuple[float, Callable[[Task, str], object]]]  # with their weights

    def __call__(self, task: Task, completion: str) -> Verdict:
        """Judge a completion, thinking included; TRL's functions see all of it, the others what follows."""
        answered = strip_thinking(completion) if MARK.search(completion) else completion
        results = [
            (weight, verifier(task, completion if isinstance(verifier, TRLReward) else answered))
            for weight, verifier in self.verifiers
        ]
        given = [(weight, as_verdict(result)) for weight, result in results if result is not None]
        if not given:
            raise TypeError("all verifiers returned None; one of them must give a reward")
        verdicts = [verdict for _, verdict in given]
        unscored = next((verdict for verdict in verdicts if not verdict.scored), None)
        if unscored is not None:
            return unscored
        reward = sum(weight * verdict.reward for weight, verdict in given)
        feedback = "\n".join(dict.fromkeys(verdict.feedback for verdict in verdicts if verdict.feedback))
        return replace(verdicts[0], reward=reward, feedback=feedback)
