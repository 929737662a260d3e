"""Adds up the rewards of several verifiers, each with its weight; the first decides whether a completion is right."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from pmd.types import Task, Verdict
from pmd.verifiers.reward import as_verdict


def combine(verifiers: Sequence[tuple[float, Callable[[Task, str], object]]]) -> Callable[[Task, str], Verdict]:
    """Return a verifier whose reward is the weighted sum of theirs.

    Status, answer and whether the completion is right are the first one's; the feedback is everyone's. If one gives no
    verdict, there is none. One that returns None is not for this task, as in TRL, and is left out.
    """

    def verify(task: Task, completion: str) -> Verdict:
        results = [(weight, verifier(task, completion)) for weight, verifier in verifiers]
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

    return verify
