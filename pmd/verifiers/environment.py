"""Judges completions by the rewards of an environment for the `verifiers` package, as its own offline scoring does.

The completion is the one reply of a trace without a sandbox. The environment's judges, if it has any, are called.
"""

import asyncio
from typing import TYPE_CHECKING

from pmd.tasks.environment import load_tasks_of
from pmd.types import Task, Verdict
from pmd.verifiers.reward import SOLVED_FROM

if TYPE_CHECKING:
    import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]


def verify_environment(task: Task, completion: str) -> Verdict:
    """Return the weighted sum of the environment's rewards as the reward; from `SOLVED_FROM` on it counts as solved.

    The explanation names each reward and metric.
    """
    columns = task.columns
    own = load_tasks_of(columns["taskset"], columns["count"])[columns["key"]]
    trace = _trace(own, task, completion)
    asyncio.run(own.score(trace))
    rewards = [f"{name} {part.score:g} x {part.weight:g}" for name, part in trace.rewards.items() if part is not None]
    metrics = [f"{name} {value:g}" for name, value in trace.metrics.items() if value is not None]
    is_right = trace.reward >= SOLVED_FROM
    return Verdict(
        trace.reward, is_right, "ok" if is_right else "wrong_answer", explanation=", ".join([*rewards, *metrics])
    )


def _trace(own: "vf.Task", task: Task, completion: str) -> "vf.Trace":
    """Return a finished trace in which the model answered the task's messages with the completion."""
    import verifiers.v1 as vf  # pyright: ignore[reportMissingImports]
    from verifiers.v1.state import state_cls  # pyright: ignore[reportMissingImports]

    kinds = {"system": vf.SystemMessage, "user": vf.UserMessage, "assistant": vf.AssistantMessage}
    messages = [kinds[message.role](content=message.content) for message in task.messages]
    nodes = [
        vf.MessageNode(parent=number - 1 if number else None, message=message)
        for number, message in enumerate(messages)
    ]
    reply = vf.MessageNode(parent=len(nodes) - 1, message=vf.AssistantMessage(content=completion), sampled=True)
    return vf.Trace(
        task=vf.TraceTask(type=type(own).__name__, data=own.data, key=own.key, hash=own.hash),
        state=state_cls(type(own))(),
        agent=vf.AgentInfo(config=vf.AgentConfig()),
        nodes=[*nodes, reply],
        is_completed=True,
        ok=True,
        stop_condition="agent_completed",
    )
