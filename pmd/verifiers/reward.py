"""Makes verifiers of the user's own code: functions of a task and a completion, and TRL's reward functions.

TRL calls `reward(prompts, completions, **columns) -> list[float]`, with messages instead of texts where the data set's
prompts are lists of messages. Here it is called for one completion at a time.
"""

import asyncio
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from pmd.types import Task, Verdict

#: From which reward on a completion counts as solved where nothing else says so; SDPO's runs use the same.
SOLVED_FROM = 0.5


@dataclass(frozen=True, slots=True)
class TRLReward:
    """A TRL reward function as a verifier."""

    function: Callable[..., Any]
    takes: frozenset[str] | None  # names of its parameters; None takes any

    def __call__(self, task: Task, completion: str) -> object:
        """Return the function's reward for this completion.

        Raises:
            TypeError: it did not return one reward for one completion.
        """
        columns = dict(task.columns)
        is_chat = "messages" in columns or isinstance(columns.get("prompt"), list)
        prompts: list[Any] = [
            [{"role": m.role, "content": m.content} for m in task.messages] if is_chat else task.question
        ]
        completions: list[Any] = [[{"role": "assistant", "content": completion}] if is_chat else completion]
        arguments = {name: [value] for name, value in columns.items() if name not in ("prompt", "messages")}
        arguments |= {"prompts": prompts, "completions": completions}
        if self.takes is not None:
            arguments = {name: value for name, value in arguments.items() if name in self.takes}
        rewards = self.function(**arguments)
        if inspect.iscoroutine(rewards):
            rewards = asyncio.run(rewards)
        if not isinstance(rewards, list | tuple) and not hasattr(rewards, "tolist"):
            raise TypeError(f"it returned {type(rewards).__name__}, not a list with a reward for each completion")
        listed = rewards.tolist() if hasattr(rewards, "tolist") else list(rewards)  # type: ignore[union-attr]
        if len(listed) != 1:
            raise TypeError(f"it returned {len(listed)} rewards for one completion")
        return listed[0]


def as_verifier(found: Any, options: Mapping[str, Any] = MappingProxyType({})) -> Callable[[Task, str], object]:
    """Return what a class path names as a function of task and completion.

    A class is instantiated with the options as arguments; a function gets them at every call. A function with a
    parameter `completions` is a TRL reward function.
    """
    made: Any = found(**options) if inspect.isclass(found) else partial(found, **options) if options else found
    try:
        parameters = inspect.signature(made).parameters
    except (TypeError, ValueError):  # no function, or one without a signature
        return made
    if "completions" not in parameters:
        return made
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return TRLReward(made, None if takes_any else frozenset(parameters))


def as_verdict(result: object) -> Verdict:
    """Return a verifier's result as a verdict: a bool says whether the completion is right, a number is its reward.

    Raises:
        TypeError: it is neither a verdict nor a number.
    """
    if isinstance(result, Verdict):
        return result
    if hasattr(result, "item"):  # of NumPy or torch
        result = result.item()  # type: ignore[union-attr]
    if not isinstance(result, bool | int | float):
        raise TypeError(
            f"it returned {type(result).__name__}; a verifier takes (task: Task, completion: str) and returns a "
            "Verdict, a reward as a number, or whether the completion is right"
        )
    is_right = result >= SOLVED_FROM
    return Verdict(float(result), is_right, "ok" if is_right else "wrong_answer")
