"""Adds up the rewards of several verifiers, each with its weight; the first decides whether a completion is right."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from pmd.types import Task, Verdict
from pmd.verifiers.reward import as_verdict


def combine(verifiers: Sequence[tuple[float, Callable[[Task, str], object]]]) -> Callable[[Task, str], Verdict]:
    """Return a verifier whose reward is the weighted sum of theirs.

    Status, answer and whether the completion is right are the first one's; the feedback is everyone's. If one gives no
    verdict, there is none.
    """

    def verify(task: Task, completion: str) -> Verdict:
        verdicts = [as_verdict(verifier(task, completion)) for _, verifier in verifiers]
        unscored = next((verdict for verdict in verdicts if not verdict.scored), None)
        if unscored is not None:
            return unscored
        reward = sum(weight * verdict.reward for (weight, _), verdict in zip(verifiers, verdicts, strict=True))
        feedback = "\n".join(dict.fromkeys(verdict.feedback for verdict in verdicts if verdict.feedback))
        return replace(verdicts[0], reward=reward, feedback=feedback)

    return verify
